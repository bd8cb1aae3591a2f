mod api;
mod dashboard;
mod faults;
mod store;
