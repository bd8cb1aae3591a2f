//! The agent container: watches the GPU, keeps the ledger of its uptime, and answers the ping
//! system. It never decides on rates or payment.

pub mod ledger;
