mod figures;
mod statement;
mod sums;
