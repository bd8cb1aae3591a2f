//! The program as a whole, seen from outside: its processes, files and answers. The modules mirror the
//! rooms of `src`.

mod agent;
mod cli;
mod deployment;
mod end_to_end;
mod hostile;
mod net;
mod ping_system;
mod readme;
mod recorded;
mod report;
mod runner;
mod seed;
mod sim;
mod support;
