//! SVG charts: lines and stacked bars over time, in the colours of the page that contains them.

use std::fmt::{self, Write as _};

use chrono::DateTime;

use crate::report::timeline::Micros;
use crate::text;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 170.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 8.0;
const BOTTOM: f64 = 22.0;
/// The number of columns to which a line's points are reduced.
const COLUMNS: usize = 600;
const SECOND: Micros = 1_000_000;

/// The time axis that charts share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TimeAxis {
    from: Micros,
    until: Micros,
}

/// A line: values over time, where there is one.
#[derive(Debug, Clone)]
pub(crate) struct LineSeries<'a> {
    /// Its class in the page's style.
    pub class: &'a str,
    /// The value from each instant on; `None` if there is none.
    pub points: Vec<(Micros, Option<f64>)>,
    /// Whether a value holds until the next one (a step), or the line interpolates.
    pub steps: bool,
}

/// A bar: a period, and its parts from bottom to top, each with its class.
#[derive(Debug, Clone)]
pub(crate) struct Bar<'a> {
    pub from: Micros,
    pub until: Micros,
    /// How high each part is.
    pub parts: Vec<(&'a str, f64)>,
}

/// What a chart is about, and its range of values.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frame<'a> {
    /// A description in words, for screen readers.
    pub label: &'a str,
    /// The least value at the lower edge; the upper edge is found.
    pub low: f64,
    /// The value that the upper edge is at least.
    pub high: f64,
    /// The unit after each value at the axis.
    pub unit: &'a str,
}

impl TimeAxis {
    /// From an instant until another one, at least a second.
    #[must_use]
    pub(crate) fn new(from: Micros, until: Micros) -> Self {
        Self {
            from,
            until: until.max(from + SECOND),
        }
    }

    fn x(self, at: Micros) -> f64 {
        let at = at.clamp(self.from, self.until);
        LEFT + share(at - self.from, self.until - self.from) * (WIDTH - LEFT - RIGHT)
    }

    /// Ticks at round intervals.
    fn ticks(self) -> (Micros, Vec<Micros>) {
        const STEPS: [Micros; 16] = [
            1, 5, 15, 30, 60, 300, 900, 1800, 3600, 10_800, 21_600, 43_200, 86_400, 172_800,
            604_800, 2_592_000,
        ];
        let length = self.until - self.from;
        let mut steps = STEPS.iter().map(|seconds| seconds * SECOND);
        let step = steps.find(|step| length / step <= 6);
        let step = step.unwrap_or(length / 6).max(1);
        let first = self.from.div_euclid(step) + i64::from(self.from.rem_euclid(step) > 0);
        let ticks = (first..)
            .map(|n| n * step)
            .take_while(|&at| at <= self.until);
        (step, ticks.collect())
    }
}

fn share(part: i64, whole: i64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "far finer than a picture")]
    let share = part as f64 / whole as f64;
    share
}

/// A chart of lines.
#[must_use]
pub(crate) fn lines(span: TimeAxis, frame: &Frame<'_>, lines: &[LineSeries<'_>]) -> String {
    text::build(|svg| write_lines(span, frame, lines, svg))
}

fn write_lines(
    span: TimeAxis,
    frame: &Frame<'_>,
    lines: &[LineSeries<'_>],
    svg: &mut String,
) -> fmt::Result {
    let values = lines.iter().flat_map(|line| &line.points);
    let highest = values
        .filter_map(|&(_, value)| value)
        .fold(frame.high, f64::max);
    let scale = Scale::new(frame.low, highest);
    write_frame(span, frame, &scale, svg)?;
    for line in lines {
        let path = text::build(|path| write_path(span, &scale, line, path));
        if !path.is_empty() {
            write!(svg, "<path class=\"line {}\" d=\"{path}\"/>", line.class)?;
        }
    }
    svg.write_str("</svg>")
}

/// A chart of stacked bars.
#[must_use]
pub(crate) fn bars(span: TimeAxis, frame: &Frame<'_>, bars: &[Bar<'_>]) -> String {
    text::build(|svg| write_bars(span, frame, bars, svg))
}

fn write_bars(
    span: TimeAxis,
    frame: &Frame<'_>,
    bars: &[Bar<'_>],
    svg: &mut String,
) -> fmt::Result {
    let height = |bar: &Bar<'_>| bar.parts.iter().map(|(_, part)| part).sum::<f64>();
    let highest = bars.iter().map(height).fold(frame.high, f64::max);
    let scale = Scale::new(frame.low, highest);
    write_frame(span, frame, &scale, svg)?;
    for bar in bars {
        let (left, right) = (span.x(bar.from), span.x(bar.until));
        let width = (right - left - 0.6).max(0.6);
        let mut below = 0.0;
        for (class, part) in bar.parts.iter().filter(|(_, part)| *part > 0.0) {
            let (bottom, top) = (scale.y(below), scale.y(below + part));
            // Even the smallest value is visible.
            let height = (bottom - top).max(0.8);
            write!(
                svg,
                "<rect class=\"{class}\" x=\"{left:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"/>",
                bottom - height
            )?;
            below += part;
        }
    }
    svg.write_str("</svg>")
}

/// The frame, the grid lines and the axis labels.
fn write_frame(span: TimeAxis, frame: &Frame<'_>, scale: &Scale, svg: &mut String) -> fmt::Result {
    write!(
        svg,
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">",
        frame.label
    )?;
    for value in scale.ticks() {
        let y = scale.y(value);
        let (end, text) = (WIDTH - RIGHT, LEFT - 6.0);
        write!(
            svg,
            "<path class=\"grid\" d=\"M{LEFT} {y:.1}H{end}\"/>\
                 <text x=\"{text}\" y=\"{:.1}\" text-anchor=\"end\">{}{}</text>",
            y + 4.0,
            number(value),
            frame.unit
        )?;
    }
    let (step, ticks) = span.ticks();
    for at in ticks {
        let x = span.x(at);
        let (bottom, text) = (HEIGHT - BOTTOM, HEIGHT - 6.0);
        let utc = DateTime::from_timestamp_micros(at).unwrap_or_default();
        // At the edges there is no room for half a word beside the frame.
        let anchor = match x {
            x if x < LEFT + 30.0 => "start",
            x if x > WIDTH - 30.0 => "end",
            _ => "middle",
        };
        let format = match step / SECOND {
            ..60 => "%H:%M:%S",
            60..86_400 => "%H:%M",
            _ => "%d %b",
        };
        // The page's script puts these words into the reader's zone.
        write!(
            svg,
            "<path class=\"tick\" d=\"M{x:.1} {bottom}v4\"/>\
                 <text class=\"at\" data-ms=\"{}\" data-step=\"{}\" x=\"{x:.1}\" y=\"{text}\" text-anchor=\"{anchor}\">{}</text>",
            at / 1000,
            step / SECOND,
            utc.format(format)
        )?;
    }
    Ok(())
}

fn write_path(
    span: TimeAxis,
    scale: &Scale,
    line: &LineSeries<'_>,
    path: &mut String,
) -> fmt::Result {
    let mut drawn: Option<f64> = None;
    for (x, value) in columns(span, &line.points) {
        let Some(value) = value else {
            if let Some(y) = drawn.take().filter(|_| line.steps) {
                write!(path, "L{x:.1} {y:.1}")?;
            }
            continue;
        };
        let y = scale.y(value);
        match drawn {
            None => write!(path, "M{x:.1} {y:.1}")?,
            Some(before) if line.steps => {
                write!(path, "L{x:.1} {before:.1}L{x:.1} {y:.1}")?;
            }
            Some(_) => write!(path, "L{x:.1} {y:.1}")?,
        }
        drawn = Some(y);
    }
    if let Some(y) = drawn.filter(|_| line.steps) {
        write!(path, "L{:.1} {y:.1}", span.x(span.until))?;
    } else if !line.steps && !path.contains('L') && !path.is_empty() {
        // A single point is visible, too.
        path.push_str("h1");
    }
    Ok(())
}

/// Points by where they stand. Of many in one column the least, the greatest and the last are enough:
/// nothing is hidden by it.
fn columns(span: TimeAxis, points: &[(Micros, Option<f64>)]) -> Vec<(f64, Option<f64>)> {
    let place = |at: Micros| (span.x(at), at);
    if points.len() <= 2 * COLUMNS {
        return points
            .iter()
            .map(|&(at, value)| (place(at).0, value))
            .collect();
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "from 0 to the number of columns"
    )]
    let column =
        |at: Micros| ((span.x(at) - LEFT) / (WIDTH - LEFT - RIGHT) * COLUMNS as f64) as usize;
    let mut kept = Vec::new();
    for same in points.chunk_by(|a, b| column(a.0) == column(b.0)) {
        let x = span.x(same[0].0);
        let values = || same.iter().filter_map(|&(_, value)| value);
        if same.iter().any(|(_, value)| value.is_none()) {
            kept.push((x, None));
        }
        if values().next().is_some() {
            kept.push((x, Some(values().fold(f64::MAX, f64::min))));
            kept.push((x, Some(values().fold(f64::MIN, f64::max))));
        }
        kept.extend(same.last().map(|&(_, value)| (x, value)));
    }
    kept
}

/// From values to heights.
struct Scale {
    low: f64,
    high: f64,
    step: f64,
}

impl Scale {
    /// From at most `low` to at least `high`, in steps that people can read.
    fn new(low: f64, high: f64) -> Self {
        let length = (high - low).max(1e-9);
        let magnitude = 10_f64.powf((length / 4.0).log10().floor());
        let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * magnitude);
        let step = steps.into_iter().find(|step| length / step <= 4.5);
        let step = step.unwrap_or(10.0 * magnitude);
        let low = (low / step + 1e-9).floor() * step;
        let steps = ((high - low) / step - 1e-9).ceil().max(1.0);
        Self {
            low,
            high: low + steps * step,
            step,
        }
    }

    fn y(&self, value: f64) -> f64 {
        let share = ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
        HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> + '_ {
        let ticks = (0_u8..).map(|n| self.low + f64::from(n) * self.step);
        ticks.take_while(|tick| *tick <= self.high + self.step * 1e-6)
    }
}

fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 1e6 => format!("{}M", rounded(value / 1e6)),
        v if v >= 1e4 => format!("{}k", rounded(value / 1e3)),
        _ => rounded(value),
    }
}

fn rounded(value: f64) -> String {
    ((value * 1000.0).round() / 1000.0).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FRAME: Frame<'_> = Frame {
        label: "x",
        low: 0.0,
        high: 1.0,
        unit: "",
    };

    #[test]
    fn values_at_the_edge_are_round() {
        for (low, high, expected) in [
            (0.0, 480.0, vec![0.0, 200.0, 400.0, 600.0]),
            (84.0, 100.0, vec![80.0, 85.0, 90.0, 95.0, 100.0]),
            (98.0, 100.0, vec![98.0, 98.5, 99.0, 99.5, 100.0]),
            (0.0, 0.03, vec![0.0, 0.01, 0.02, 0.03]),
        ] {
            let scale = Scale::new(low, high);
            let ticks: Vec<f64> = scale.ticks().map(|t| (t * 1e6).round() / 1e6).collect();
            assert_eq!(ticks, expected);
        }
        assert_eq!(
            [0.25, 1500.0, 20_000.0, 3e6].map(number),
            ["0.25", "1500", "20k", "3M"]
        );
    }

    #[test]
    fn a_step_holds_until_the_next_one_and_a_gap_is_left_open() {
        let span = TimeAxis::new(0, 10 * SECOND);
        let line = LineSeries {
            class: "a",
            points: vec![(0, Some(1.0)), (5 * SECOND, Some(0.0)), (8 * SECOND, None)],
            steps: true,
        };
        let path = text::build(|path| write_path(span, &Scale::new(0.0, 1.0), &line, path));
        assert_eq!(path, "M52.0 8.0L381.0 8.0L381.0 148.0L578.4 148.0");
    }

    #[test]
    fn bars_stand_on_each_other() {
        let bar = Bar {
            from: 0,
            until: 5 * SECOND,
            parts: vec![("good", 3.0), ("bad", 1.0), ("none", 0.0)],
        };
        let svg = bars(TimeAxis::new(0, 10 * SECOND), &FRAME, &[bar]);
        assert_eq!(svg.matches("<rect").count(), 2);
        assert!(svg.contains("class=\"bad\" x=\"52.0\" y=\"8.0\""), "{svg}");
    }

    proptest! {
        #[test]
        fn all_points_stand_within_the_frame(
            points in prop::collection::vec((0_i64..1_000_000_000, prop::option::of(0.0..1e9_f64)), 0..3000),
        ) {
            let mut points = points;
            points.sort_by_key(|point| point.0);
            let line = LineSeries { class: "a", points, steps: true };
            let svg = lines(TimeAxis::new(0, 1_000_000_000), &FRAME, &[line]);
            let path = svg.split("class=\"line a\" d=\"").nth(1).map(|rest| rest.split('"').next().unwrap());
            for place in path.unwrap_or_default().split(['M', 'L']).filter(|place| !place.is_empty()) {
                let (x, y) = place.split_once(' ').unwrap();
                let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
                prop_assert!((LEFT..=WIDTH - RIGHT).contains(&x) && (TOP..=HEIGHT - BOTTOM).contains(&y));
            }
            prop_assert!(svg.len() < 200_000);
        }
    }
}
