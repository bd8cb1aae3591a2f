//! What it takes to send a job: when it is due, what it looks like, whether there is room and money for
//! it, and what the gateway's answer means.

pub mod budget;
pub mod capability;
pub mod gateway;
pub mod in_flight;
pub mod pacer;
pub mod template;
pub mod timer;
