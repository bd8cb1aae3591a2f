//! What the operator of an agent should look at.

use crate::wire::agent::is_agent_id;

/// Clocks that differ by more are warned about. No figure depends on it.
pub(crate) const MAX_CLOCK_OFFSET_SECONDS: f64 = 5.0;

/// More GPUs that others report, too, say nothing new.
const MAX_SHARED_GPUS: usize = 3;

/// The warnings about an agent; `also_reported` are GPUs of it, each with another agent that reports it.
pub(crate) fn of_agent(
    agent_id: &str,
    clock_offset_seconds: Option<f64>,
    also_reported: &[(String, String)],
) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some(offset) = clock_offset_seconds.filter(|offset| is_far_off(*offset)) {
        warnings.push(clock_offset(offset));
    }
    for (uuid, other) in also_reported.iter().take(MAX_SHARED_GPUS) {
        warnings.push(shared_gpu(uuid, other));
    }
    if !is_agent_id(agent_id) {
        warnings.push(
            "its id has characters that ids may no longer have: register it under another one"
                .to_owned(),
        );
    }
    warnings
}

/// `other` is another agent.
pub(crate) fn shared_gpu(uuid: &str, other: &str) -> String {
    format!("its GPU {uuid} is reported by agent {other}, too")
}

pub(crate) fn is_far_off(clock_offset_seconds: f64) -> bool {
    clock_offset_seconds.abs() > MAX_CLOCK_OFFSET_SECONDS
}

pub(crate) fn clock_offset(seconds: f64) -> String {
    let direction = if seconds > 0.0 { "ahead of" } else { "behind" };
    format!(
        "its clock is {:.1} s {direction} the ping system's",
        seconds.abs()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_that_differ_much_and_odd_ids_are_warned_about() {
        assert_eq!(of_agent("a", None, &[]), [""; 0]);
        assert_eq!(of_agent("a", Some(-5.0), &[]), [""; 0]);
        assert_eq!(
            of_agent("a", Some(-3600.04), &[]),
            ["its clock is 3600.0 s behind the ping system's"]
        );
        let shared = [("GPU-1".to_owned(), "b".to_owned())];
        assert_eq!(
            of_agent("a", None, &shared),
            ["its GPU GPU-1 is reported by agent b, too"]
        );
        assert_eq!(of_agent("a\u{200b}", Some(7.3), &[]).len(), 2);
    }
}
