//! A report as one page that needs nothing else: figures, and charts over time.

use std::fmt::Write as _;

use super::chart::{self, Bar, Frame, LineSeries, TimeAxis};
use crate::money::Wei;
use crate::report::cost::Cost;
use crate::report::effect::Effect;
use crate::report::forecast::TierForecast;
use crate::report::history::{AgentHistory, RecordedRuns};
use crate::report::suggest::Suggestion;
use crate::report::summary::{AgentReport, Report};
use crate::report::timeline::{Micros, Timeline};
use crate::units::Percent;

/// The whole page.
pub(crate) fn page(report: &Report, history: &RecordedRuns) -> String {
    let mut page = String::new();
    // Writing to a string cannot fail.
    let _ = write_page(report, history, &mut page);
    page
}

fn write_page(report: &Report, history: &RecordedRuns, page: &mut String) -> std::fmt::Result {
    let (from, until) = (time(history.from), time(history.until));
    write!(
        page,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>uptime-runner: report</title>\n<style>\n{}{}</style>\n</head>\n<body>\n\
         <h1>Report of {} run{}</h1>\n<p>{from} – {until} <span class=\"soft\" id=\"zone\">Times are UTC.</span></p>\n",
        include_str!("../../palette.css"),
        include_str!("page.css"),
        report.runs,
        if report.runs == 1 { "" } else { "s" },
    )?;
    if report.records_dropped > 0 {
        writeln!(
            page,
            "<p class=\"warn\">{} records are missing: the disk was too slow.</p>",
            report.records_dropped
        )?;
    }
    let total = &report.total;
    write!(
        page,
        "<p><b>{}</b> jobs, <b>{}</b> good",
        total.jobs,
        percent(total.success_rate_percent)
    )?;
    if let (Some(spent), Some(not_spent)) = (&total.spent_wei, &total.not_spent_wei) {
        write!(
            page,
            "; spent <b>{}</b>, not spent because of punishment <b>{}</b>",
            eth(spent),
            eth(not_spent)
        )?;
    }
    page.push_str("</p>\n");
    write_agents_table(report, page)?;
    if let Some(suggestion) = &report.suggestion {
        write_suggestion(suggestion, page)?;
    }
    let pictured = |name: &String| {
        let history = history.agents.get(name);
        history.is_some_and(|history| !history.jobs.slices.all.is_empty())
    };
    let charted = report.agents.keys().filter(|name| pictured(name)).count();
    if charted < report.agents.len() {
        writeln!(
            page,
            "<p class=\"soft\">Below are the {charted} followed agents with the worst uptime.</p>"
        )?;
    }
    let span = TimeAxis::new(history.from, history.until);
    for (name, agent) in report.agents.iter().filter(|(name, _)| pictured(name)) {
        writeln!(page, "<h2>{}</h2>\n<div class=\"cards\">", escaped(name))?;
        let followed = |history: &&AgentHistory| {
            history.runs.iter().any(|run| !run.rates.is_empty()) || history.jobs.all() > 0
        };
        if let Some(history) = history.agents.get(name).filter(followed) {
            write_charts(name, history, span, page)?;
        }
        write_figures(agent, page)?;
        page.push_str("</div>\n");
    }
    writeln!(
        page,
        "<script>\n{}</script>\n</body>\n</html>",
        include_str!("page.js")
    )
}

fn write_agents_table(report: &Report, page: &mut String) -> std::fmt::Result {
    page.push_str(
        "<h2>Agents</h2>\n<div class=\"card scroll\"><table>\n<tr><th>agent<th>uptime<th>slots<th>withheld\
         <th>jobs<th>good<th>spent<th>for a good job<th>good jobs for an ETH (95 of 100 times within)</tr>\n",
    );
    // First those that gave most for their money, then the others by name.
    let ranked = report.ranking.iter().map(|ranked| &ranked.agent);
    let is_ranked = |name: &String| report.ranking.iter().any(|ranked| ranked.agent == *name);
    let others = report.agents.keys().filter(|name| !is_ranked(name));
    for name in ranked.chain(others) {
        let Some(agent) = report.agents.get(name) else {
            continue;
        };
        let (jobs, good) = agent.capabilities.values().fold((0, 0), |sum, jobs| {
            (sum.0 + jobs.jobs, sum.1 + jobs.successful)
        });
        let cost = agent.cost.as_ref();
        let each = cost.and_then(|cost| cost.per_good_job_wei.as_ref());
        let per_eth = cost.and_then(|cost| cost.good_jobs_per_eth);
        writeln!(
            page,
            "<tr><td>{}<td>{}<td>{}<td>{}<td>{jobs}<td>{good}<td>{}<td>{}<td>{}</tr>",
            escaped(name),
            percent(agent.uptime_percent),
            agent.slots,
            agent.slots_withheld,
            cost.map_or_else(|| "–".to_owned(), |cost| eth(&cost.spent_wei)),
            each.map_or_else(|| "–".to_owned(), eth),
            per_eth.map_or_else(
                || "–".to_owned(),
                |jobs| format!(
                    "{:.4e} ({:.4e} – {:.4e})",
                    jobs.estimate, jobs.low, jobs.high
                )
            ),
        )?;
    }
    page.push_str("</table></div>\n");
    Ok(())
}

fn write_charts(
    name: &str,
    agent: &AgentHistory,
    span: TimeAxis,
    page: &mut String,
) -> std::fmt::Result {
    let name = escaped(name);
    let percentiles = [("p50", "half"), ("p90", "90 %"), ("p99", "99 %")];
    let outcomes = [("good", "good"), ("bad", "failed")];
    let charts = [
        Card {
            title: "Uptime",
            keys: &[("uptime", "as reported")],
            svg: uptime_chart(&name, agent, span),
        },
        Card {
            title: "Rate",
            keys: &[("rate", "jobs per minute")],
            svg: rate_chart(&name, agent, span),
        },
        Card {
            title: "Latency within",
            keys: &percentiles,
            svg: latency_chart(&name, agent, span),
        },
        Card {
            title: "Jobs",
            keys: &outcomes,
            svg: outcome_chart(&name, agent, span),
        },
    ];
    for Card { title, keys, svg } in charts {
        write!(page, "<div class=\"card\"><h3>{title}")?;
        for (class, word) in keys {
            write!(page, " <span class=\"key k-{class}\">{word}</span>")?;
        }
        writeln!(page, "</h3>{svg}</div>")?;
    }
    Ok(())
}

/// A chart, with a class and a word for each of its colours.
struct Card<'a> {
    title: &'a str,
    keys: &'a [(&'a str, &'a str)],
    svg: String,
}

fn uptime_chart(name: &str, agent: &AgentHistory, span: TimeAxis) -> String {
    let known = agent.runs.iter().flat_map(Timeline::known);
    let lowest = known.map(|known| known.uptime.get()).fold(99.0, f64::min);
    let frame = Frame {
        label: &format!("{name}: uptime over time"),
        low: (lowest - 0.5).max(0.0).floor(),
        high: 100.0,
        unit: "%",
    };
    let uptime = LineSeries {
        class: "uptime",
        points: over_time(&agent.runs, |run| {
            let uptimes = run.uptimes.iter();
            uptimes
                .map(|&(at, uptime)| (at, uptime.map(Percent::get)))
                .collect()
        }),
        steps: true,
    };
    chart::lines(span, &frame, &[uptime])
}

fn rate_chart(name: &str, agent: &AgentHistory, span: TimeAxis) -> String {
    let frame = Frame {
        label: &format!("{name}: rate over time"),
        low: 0.0,
        high: 1.0,
        unit: "",
    };
    let rate = LineSeries {
        class: "rate",
        points: over_time(&agent.runs, |run| {
            let rates = run.rates.iter();
            rates
                .map(|step| (step.at, Some(f64::from(step.rate.get()))))
                .collect()
        }),
        steps: true,
    };
    chart::lines(span, &frame, &[rate])
}

fn latency_chart(name: &str, agent: &AgentHistory, span: TimeAxis) -> String {
    let frame = Frame {
        label: &format!("{name}: latency percentiles over time"),
        low: 0.0,
        high: 1.0,
        unit: " ms",
    };
    let slices = &agent.jobs.slices;
    let percentile = |class: &'static str, quantile: f64| LineSeries {
        class,
        points: slices
            .spans()
            .zip(&slices.all)
            .map(|((from, until), slice)| {
                #[expect(
                    clippy::cast_precision_loss,
                    reason = "microseconds of at most an hour"
                )]
                let millis = |micros: u64| micros as f64 / 1e3;
                let latencies = slice.latencies.as_ref();
                let value = latencies.map(|all| millis(all.value_at_quantile(quantile)));
                (from.midpoint(until), value)
            })
            .collect(),
        steps: false,
    };
    let lines = [
        percentile("p99", 0.99),
        percentile("p90", 0.9),
        percentile("p50", 0.5),
    ];
    chart::lines(span, &frame, &lines)
}

fn outcome_chart(name: &str, agent: &AgentHistory, span: TimeAxis) -> String {
    let frame = Frame {
        label: &format!("{name}: outcomes over time"),
        low: 0.0,
        high: 1.0,
        unit: "",
    };
    let slices = &agent.jobs.slices;
    let bars = slices.spans().zip(&slices.all);
    let bars = bars.map(|((from, until), slice)| {
        #[expect(clippy::cast_precision_loss, reason = "exact up to 2^53 jobs")]
        let count = |jobs: u64| jobs as f64;
        let parts = vec![("good", count(slice.good)), ("bad", count(slice.failed))];
        Bar { from, until, parts }
    });
    chart::bars(span, &frame, &bars.collect::<Vec<_>>())
}

/// What runs say over time, with a gap behind each.
fn over_time(
    runs: &[Timeline],
    points: impl Fn(&Timeline) -> Vec<(Micros, Option<f64>)>,
) -> Vec<(Micros, Option<f64>)> {
    let mut all = Vec::new();
    for run in runs {
        let of_run = points(run);
        if !of_run.is_empty() {
            all.extend(of_run);
            all.push((run.end, None));
        }
    }
    all
}

fn write_figures(agent: &AgentReport, page: &mut String) -> std::fmt::Result {
    page.push_str("<div class=\"card\"><h3>Figures</h3><dl>\n");
    let mut figure = |name: &str, value: String| writeln!(page, "<dt>{name}<dd>{value}");
    figure("mean uptime", percent(agent.uptime_percent))?;
    figure(
        "slots",
        format!(
            "{}, of which {} were withheld",
            agent.slots, agent.slots_withheld
        ),
    )?;
    for (reason, slots) in &agent.withheld_by_reason {
        figure("withheld", format!("{slots} ({reason})"))?;
    }
    for (name, jobs) in &agent.capabilities {
        let outcomes: Vec<String> = jobs
            .outcomes
            .iter()
            .map(|(outcome, count)| format!("{outcome} {count}"))
            .collect();
        figure(
            &escaped(name),
            format!(
                "{}: {}",
                percent(jobs.success_rate_percent),
                outcomes.join(", ")
            ),
        )?;
    }
    if let Some(Cost {
        spent_wei,
        not_spent_wei,
        top_ups,
        ..
    }) = &agent.cost
    {
        figure("spent", format!("{spent_wei} wei"))?;
        figure(
            "not spent because of punishment",
            format!("{not_spent_wei} wei"),
        )?;
        if *top_ups > 0 {
            figure("topped up", format!("{top_ups} times"))?;
        }
    }
    if let Some(claims) = &agent.claims {
        let class = if claims.contradicted.is_empty() {
            ""
        } else {
            " class=\"warn\""
        };
        let times = claims.contradicted.len();
        let text = format!(
            "<span{class}>contradicted {times} of {} times</span>",
            claims.looks
        );
        figure("claims against evidence", text)?;
    }
    if let Some(discovery) = &agent.discovery {
        let differs = discovery.minutes_up_but_not_listed + discovery.minutes_listed_but_down;
        let text = format!(
            "{} min, not listed {} min; {differs:.1} min the uptime said otherwise",
            discovery.minutes_listed, discovery.minutes_not_listed
        );
        figure("runner listed", text)?;
    }
    for what_if in &agent.what_if {
        let more = what_if.spent_more_wei.as_ref();
        let money = more.map_or_else(String::new, |more| format!(", {more} wei"));
        let good = what_if
            .good_jobs_more
            .map_or_else(String::new, |good| format!(" ({good:+} good)"));
        figure(
            &escaped(&what_if.policy),
            format!(
                "{} jobs, {:+}{good}{money}",
                what_if.jobs, what_if.jobs_more
            ),
        )?;
    }
    page.push_str("</dl></div>\n");
    if let Some(effect) = &agent.punishment {
        write_effect(effect, page)?;
    }
    if let Some(forecasts) = agent
        .forecast
        .as_ref()
        .filter(|forecasts| !forecasts.is_empty())
    {
        write_forecasts(forecasts, page)?;
    }
    Ok(())
}

fn write_effect(effect: &Effect, page: &mut String) -> std::fmt::Result {
    write!(
        page,
        "<div class=\"card\"><h3>What {} drops of the rate did</h3><table>\n\
         <tr><th>hour<th>uptime<th>jobs<th>good</tr>\n",
        effect.drops
    )?;
    let hours = [("before".to_owned(), &effect.together.hour_before)].into_iter();
    let after = effect.together.hours_after.iter().enumerate();
    for (when, hour) in hours.chain(after.map(|(n, hour)| (format!("{} after", n + 1), hour))) {
        writeln!(
            page,
            "<tr><td>{when}<td>{}<td>{}<td>{}</tr>",
            percent(hour.uptime_percent),
            hour.jobs,
            percent(hour.success_rate_percent)
        )?;
    }
    page.push_str("</table></div>\n");
    Ok(())
}

fn write_forecasts(forecasts: &[TierForecast], page: &mut String) -> std::fmt::Result {
    page.push_str(
        "<div class=\"card scroll\"><h3>Forecast (Brier score: 0 is best; beside it that of “as now”)</h3><table>\n\
         <tr><th>at or over<th>now<th>in an hour<th>Brier<th>as now<th>in a day<th>Brier<th>as now</tr>\n",
    );
    let score = |score: Option<f64>| score.map_or_else(|| "–".to_owned(), |s| format!("{s:.3}"));
    for forecast in forecasts {
        write!(
            page,
            "<tr><td>{}<td>{}",
            percent(Some(forecast.tier_percent)),
            if forecast.reached { "yes" } else { "no" }
        )?;
        for chance in [forecast.next_hour, forecast.next_day] {
            write!(
                page,
                "<td>{:.1}%<td>{}<td>{}",
                chance.chance * 100.0,
                score(chance.brier),
                score(chance.brier_as_now)
            )?;
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</table></div>\n");
    Ok(())
}

fn write_suggestion(suggestion: &Suggestion, page: &mut String) -> std::fmt::Result {
    let cost = suggestion.cost_per_job_wei.as_ref();
    write!(
        page,
        "<h2>Tiers worth most</h2>\n<div class=\"card\"><dl>\n\
         <dt>a good job is worth<dd>{} wei\n<dt>a job costs<dd>{}\n<dt>compared<dd>{} policies\n",
        suggestion.value_per_good_job_wei,
        cost.map_or_else(
            || "nothing (no cost is known)".to_owned(),
            |cost| format!("{cost} wei")
        ),
        suggestion.policies_compared
    )?;
    for (what, worth) in [
        ("recorded", &suggestion.recorded),
        ("best", &suggestion.best),
    ] {
        writeln!(
            page,
            "<dt>{what}<dd>{}: {} jobs, {} of them good as expected",
            escaped(&worth.policy),
            worth.jobs,
            worth.good_jobs
        )?;
    }
    writeln!(
        page,
        "<dt>gain<dd>{} wei (90 of 100 times from {} to {})\n</dl></div>",
        suggestion.gain_wei, suggestion.gain_low_wei, suggestion.gain_high_wei
    )
}

fn percent(percent: Option<Percent>) -> String {
    percent.map_or_else(|| "unknown".to_owned(), |p| format!("{}%", p.floored(2)))
}

fn eth(amount: &Wei) -> String {
    format!("{} ETH", amount.in_eth())
}

/// In UTC; the page's script puts it into the reader's zone.
fn time(at: Micros) -> String {
    format!(
        "<time data-ms=\"{}\">{}</time>",
        at / 1000,
        crate::report::timeline::utc(at)
    )
}

/// Names are foreign: agents register themselves.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}
