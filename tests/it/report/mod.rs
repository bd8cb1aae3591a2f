mod damaged;
mod figures;
mod statement;
mod sums;
