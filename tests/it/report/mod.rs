mod figures;
mod sums;
