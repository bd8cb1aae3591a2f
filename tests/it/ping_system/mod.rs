mod access;
mod api;
mod dashboard;
mod faults;
mod observation;
mod postgres;
mod sqlite;
mod store;
