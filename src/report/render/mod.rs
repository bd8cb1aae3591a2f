//! Reports and statements as text, page, CSV and JSON.

pub mod chart;
pub mod html;
pub mod statement;
pub mod text;
