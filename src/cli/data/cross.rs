//! `data cross` and `data review`: what was typed, what it means, what is printed.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::cli::args::Global;
use crate::cli::dry_run::Outline;
use crate::cli::print::{self, Output};
use crate::data::cross::client::Limits;
use crate::data::cross::endpoint::EndpointOptions;
use crate::error::{Error, Result};
use crate::stage::common::Common;
use crate::stage::data::cross::{CrossOptions, CrossReport, Prepared};
use crate::stage::data::review::{self, How, ReviewOptions, ReviewReport};

/// `data cross`.
#[derive(Debug, Args)]
pub struct CrossArgs {
    /// Task files (JSONL) whose questions name one domain each, in `domains`
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    pub source: Vec<PathBuf>,
    /// What edges are trained on, in any form that train reads, or tasks: sources that stand in it are left out
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub train: Vec<PathBuf>,
    /// Use sources that stand in --train, or of which nothing is known
    #[arg(long)]
    pub allow_leak: bool,
    /// Two domains that meet; several are several sets [default: all with all]
    #[arg(long, value_name = "A,B", value_parser = pair)]
    pub pair: Vec<[String; 2]>,
    /// Items of each pair of domains
    #[arg(long, default_value_t = 500, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub items: u64,
    /// Pairs of questions that are tried for each pair of domains, at most [default: 20 for each item]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub candidates: Option<u64>,
    /// The endpoint: http(s)://host/v1
    #[arg(long, value_name = "URL")]
    pub base_url: String,
    /// The model's name there
    #[arg(long, value_name = "NAME")]
    pub model: String,
    /// Certificates (PEM) of the authorities that vouch for an https endpoint [default: those that browsers trust]
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// The environment variable that holds the key; without one no key is sent
    #[arg(long, default_value = "OPENAI_API_KEY", value_name = "VARIABLE")]
    pub key_env: String,
    /// Sampling temperature [default: the endpoint's]
    #[arg(long, value_name = "X")]
    pub temperature: Option<f64>,
    /// The most tokens of an answer, thinking included [default: the endpoint's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub answer_tokens: Option<u64>,
    /// Requests at a time
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=512))]
    pub concurrency: u16,
    /// Seconds that one answer may take
    #[arg(long, default_value_t = 600, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,
    /// Seconds for which a request is tried again while the endpoint is busy or away
    #[arg(long, default_value_t = 1800, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(..=604_800))]
    pub patience: u64,
    /// The most requests, those of earlier runs with the ledger included
    #[arg(long, value_name = "N")]
    pub max_requests: Option<u64>,
    /// No request once this many tokens are spent, those of earlier runs with the ledger included
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<u64>,
    /// Drop questions that the model answers with one domain's knowledge alone: two more requests each
    #[arg(long)]
    pub single_domain_check: bool,
    /// Where answers are kept [default: OUT.ledger.jsonl]
    #[arg(long, value_name = "FILE")]
    pub ledger: Option<PathBuf>,
    /// Where to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// `data review`.
#[derive(Debug, Args)]
pub struct ReviewArgs {
    /// The folder that data cross wrote
    pub dir: PathBuf,
    /// Who looks: letters, digits, - and _
    #[arg(long, default_value = "reviewer", value_name = "NAME")]
    pub reviewer: String,
    /// How many items, drawn by --seed: the same for all who give the same [default: all]
    #[arg(long, value_name = "N")]
    pub sample: Option<usize>,
    /// On the terminal, line by line, not on a page
    #[arg(long, conflicts_with = "summary")]
    pub terminal: bool,
    /// Show nothing: count what was decided, compare reviewers, write --accepted
    #[arg(long)]
    pub summary: bool,
    /// The page's port on 127.0.0.1 [default: any that is free]
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "PORT")]
    pub port: u16,
    /// In the end, a task of the items that all who decided accept
    #[arg(long, value_name = "FILE")]
    pub accepted: Option<PathBuf>,
    /// Take items that nobody decided as accepted, as where only a sample is reviewed
    #[arg(long, requires = "accepted")]
    pub keep_undecided: bool,
}

fn pair(typed: &str) -> Result<[String; 2], String> {
    match typed.split_once(',') {
        Some((a, b)) if !a.is_empty() && !b.is_empty() && !b.contains(',') => Ok([a.into(), b.into()]),
        _ => Err(format!("{typed:?} is no pair of domains like humanities,stem")),
    }
}

impl CrossArgs {
    /// What they mean.
    pub fn options(&self) -> Result<CrossOptions> {
        if let Some(t) = self.temperature.filter(|t| !(0.0..=2.0).contains(t)) {
            return Err(Error::Usage(format!("--temperature is {t}, expected 0 to 2")));
        }
        Ok(CrossOptions {
            sources: self.source.clone(),
            train: self.train.clone(),
            allow_leak: self.allow_leak,
            pairs: self.pair.clone(),
            items: self.items,
            candidates: self.candidates.unwrap_or(self.items.saturating_mul(20)),
            endpoint: EndpointOptions {
                base_url: self.base_url.clone(),
                model: self.model.clone(),
                ca: self.ca.clone(),
                key_env: self.key_env.clone(),
                temperature: self.temperature,
                answer_tokens: self.answer_tokens,
                timeout: Duration::from_secs(self.timeout),
                connections: usize::from(self.concurrency),
            },
            concurrency: usize::from(self.concurrency),
            limits: Limits {
                requests: self.max_requests,
                tokens: self.max_tokens,
                patience: Duration::from_secs(self.patience),
            },
            single_domain_check: self.single_domain_check,
            ledger: self.ledger.clone(),
            out: self.out.clone(),
        })
    }
}

impl ReviewArgs {
    /// What they mean.
    pub fn options(&self) -> ReviewOptions {
        ReviewOptions {
            dir: self.dir.clone(),
            reviewer: self.reviewer.clone(),
            sample: self.sample,
            how: match (self.terminal, self.summary) {
                (true, _) => How::Terminal,
                (_, true) => How::Summary,
                _ => How::Page { port: self.port },
            },
            accepted: self.accepted.clone(),
            keep_undecided: self.keep_undecided,
        }
    }
}

impl CrossArgs {
    /// Does what was typed.
    pub(super) fn run(&self, global: &Global, common: &Common, out: Output) -> Result<()> {
        let report = Prepared::new(self.options()?, global.seed)?.run(common)?;
        print::warnings(&report.warnings);
        out.report(&report, || cross(&report))
    }

    /// What would be read and written.
    pub(super) fn outline(&self, outline: &mut Outline, global: &Global, common: &Common) -> Result<()> {
        let options = self.options()?;
        outline.reads(options.sources.iter().chain(&options.train).chain(&options.endpoint.ca));
        outline.folder(&options.out, common)?;
        outline.steps = Prepared::new(options, global.seed)?.steps();
        Ok(())
    }
}

impl ReviewArgs {
    /// Does what was typed.
    pub(super) fn run(&self, common: &Common, out: Output) -> Result<()> {
        let told = |url: &str| {
            eprintln!("open {url}\nCtrl-C or Finish on the page ends it; from another machine, ssh -L first");
        };
        let report = review::run(&self.options(), common, told)?;
        out.report(&report, || reviewed(&report))
    }
}

/// A row a pair of domains.
fn cross(r: &CrossReport) -> String {
    let mut rows = vec![
        ["task", "items", "candidates", "unmergeable", "malformed", "refused", "single-domain", "A/B/C/D"]
            .map(String::from)
            .to_vec(),
    ];
    for p in &r.summary.pairs {
        let counts = [p.items, p.candidates, p.unmergeable, p.malformed, p.refused, p.single_domain];
        let mut row = vec![r.out.join(&p.file).display().to_string()];
        row.extend(counts.map(|n| n.to_string()));
        row.push(p.answers.map(|n| n.to_string()).join("/"));
        rows.push(row);
    }
    let mut text = print::table(&rows);
    if r.already_finished {
        text += "already finished\n";
    } else {
        text += &format!(
            "{} requests and {} tokens in all, kept in {}\n",
            r.requests,
            r.tokens,
            r.ledger.display()
        );
    }
    text + &format!("people check it: anabranch data review {}\n", r.out.display())
}

fn reviewed(r: &ReviewReport) -> String {
    let rejected: usize = r.rejected.values().sum();
    let mut text = format!(
        "{}: {} of {} items decided by {}, {} accepted, {} edited, {rejected} rejected",
        r.dir.display(),
        r.decided,
        r.items,
        r.reviewer,
        r.accepted,
        r.edited
    );
    if rejected > 0 {
        let reasons = r.rejected.iter().map(|(reason, n)| format!("{n} {}", reason.label()));
        text += &format!(" ({})", reasons.collect::<Vec<_>>().join(", "));
    }
    if r.stale > 0 {
        text += &format!(
            "\n{} decisions are about texts that the items no longer have, and do not count",
            r.stale
        );
    }
    for a in r.agreement.iter().filter(|a| a.both > 0) {
        let kappa = match a.kappa {
            Some(kappa) => format!("Cohen's kappa {kappa:.3}"),
            None => "Cohen's kappa is not defined, as both say the same of all".into(),
        };
        let [first, second] = &a.reviewers;
        text += &format!("\n{first} and {second}: {} of {} agreed, {kappa}", a.agreed, a.both);
    }
    if let Some(f) = &r.accepted_file {
        text += &format!(
            "\n{}: {} items ({} rejected, {} disputed, {} undecided)",
            f.file.display(),
            f.items,
            f.rejected,
            f.disputed,
            f.undecided
        );
    }
    text
}
