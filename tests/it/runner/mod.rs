mod addresses;
mod agents;
mod check;
mod ending;
mod records;
mod send;
mod subscription;
mod uptime;
