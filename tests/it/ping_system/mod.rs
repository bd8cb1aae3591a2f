mod api;
mod dashboard;
mod faults;
mod postgres;
mod sqlite;
mod store;
