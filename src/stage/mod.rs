//! One file a verb: what a command does, as a function from options to a report that can be printed or serialised.
//!
//! Stages are generic over the back end and the precision; they write through `checkpoint::output` and print nothing.

pub mod adapters;
pub mod admit;
pub mod budget;
pub mod calibrate;
pub mod common;
pub mod conflict;
pub mod data;
pub mod demo;
pub mod doctor;
pub mod evaluate;
pub mod export;
pub mod flow;
pub mod fuse;
pub mod generate;
pub mod grams;
pub mod inspect;
pub mod join;
mod journal;
pub mod keys;
pub mod logits;
pub mod measure;
mod merged;
pub mod metrics;
mod modules;
pub mod peak;
pub mod progress;
pub mod prune;
pub mod recover;
pub mod report;
pub mod sign;
pub mod train;
pub mod train_state;
pub mod trust;
pub mod verify;
