//! MMLU (Hendrycks et al., ICLR 2021): the forms that it is spread in, its domains, and the cut into edges' data.

pub mod cut;
pub mod domains;
pub mod import;
mod parquet;
pub mod rows;
