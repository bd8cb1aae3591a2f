//! Reports and statements as text, page, CSV and JSON.

pub(crate) mod chart;
pub(crate) mod html;
pub(crate) mod statement;
pub(crate) mod text;
