mod agents;
mod ending;
mod records;
mod send;
mod subscription;
mod uptime;
