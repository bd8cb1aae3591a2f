//! What it takes to send a job: when it is due, what it looks like, whether there is room and money for
//! it, and what the gateway's answer means.

mod answer;
pub(crate) mod budget;
pub(crate) mod capability;
pub(crate) mod destination;
pub(crate) mod gateway;
pub(crate) mod in_flight;
pub(crate) mod live_runner;
pub(crate) mod orchestrators;
pub(crate) mod pacer;
pub(crate) mod template;
pub(crate) mod timer;
