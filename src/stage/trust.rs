//! Which adapters are let in: whose signatures are right, whose signers are trusted, and which are of this round.
//!
//! Whatever signature is there is checked, trusted folder or not, before a file is parsed. With a trusted folder every
//! adapter needs one.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Serialize;

use crate::checkpoint::keys::{PublicKey, Role, Trusted};
use crate::checkpoint::manifest::{Chain, EDGE, MANIFEST, Occasion};
use crate::error::{Error, Result};

/// What is asked of those that are let in.
#[derive(Clone, Debug, Default)]
pub struct TrustOptions {
    /// The folder of the public keys that are trusted; without it nobody's are asked for.
    pub trusted: Option<PathBuf>,
    /// The run and the round that are expected, as far as they are named.
    pub expected: Occasion,
}

/// Who signed, and what the trusted folder calls them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Signatory {
    /// The public key.
    pub key: PublicKey,
    /// The key's name in the trusted folder; none where nobody was asked.
    pub name: Option<String>,
}

/// One folder that was let in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Admitted {
    /// Who signed it; none where it is not signed.
    pub signer: Option<Signatory>,
    /// Who signed the adapter that it was recovered from.
    pub edge: Option<Signatory>,
    /// For which run and round.
    pub occasion: Occasion,
    /// Files that were checked.
    pub files: usize,
}

/// The trusted keys, and what is expected.
#[derive(Debug)]
pub struct Gate {
    trusted: Option<Trusted>,
    expected: Occasion,
}

impl Gate {
    /// Reads the trusted keys.
    pub fn new(options: &TrustOptions) -> Result<Gate> {
        options.expected.check()?;
        let trusted = options.trusted.as_deref().map(Trusted::open).transpose()?;
        Ok(Gate { trusted, expected: options.expected.clone() })
    }

    /// Lets the adapter of an edge in, as `recover` does.
    pub fn edge(&self, dir: &Path) -> Result<Admitted> {
        let Some(chain) = self.signed(dir)? else { return Ok(unsigned()) };
        if chain.edge.is_some() {
            return Err(Error::file(dir, "keeps the signature of an edge: it was recovered already"));
        }
        self.admit(dir, &chain, Role::Edge)
    }

    /// Lets adapters in that are to be fused: under a trusted folder, those of a pruned model that a trusted recoverer
    /// signed and that keep a trusted edge's signature, and those of the full model, which nobody had to recover, that a
    /// trusted edge signed. Also gives what a user should know and what is no error.
    ///
    /// Under a trusted folder all are of one run and round, and of one edge each.
    pub fn fusion(&self, dirs: &[PathBuf]) -> Result<(Vec<Admitted>, Vec<String>)> {
        // Gathered before the first error is looked for, so that it is always the same one.
        let all: Vec<_> = dirs.par_iter().map(|dir| self.recovered(dir)).collect();
        let all = all.into_iter().collect::<Result<Vec<_>>>()?;
        let (Some(trusted), Some(first)) = (&self.trusted, all.first()) else { return Ok((all, Vec::new())) };
        for (n, (dir, a)) in dirs.iter().zip(&all).enumerate() {
            if a.occasion != first.occasion {
                let why = format!(
                    "is of {}, {} is of {}: adapters of one round are fused",
                    a.occasion,
                    dirs[0].display(),
                    first.occasion
                );
                return Err(Error::file(dir, why));
            }
            let origin = |a: &Admitted| a.edge.as_ref().or(a.signer.as_ref()).map(|s| s.key);
            if let Some(m) = all[..n].iter().position(|other| origin(other) == origin(a)) {
                let name = origin(a).and_then(|k| trusted.name(&k, Role::Edge).ok().map(String::from));
                let why = format!(
                    "comes from edge {:?}, and so does {}: an edge counts once",
                    name.unwrap_or_default(),
                    dirs[m].display()
                );
                return Err(Error::file(dir, why));
            }
        }
        let mut warnings = Vec::new();
        if self.expected.round.is_none() || self.expected.run.is_none() {
            warnings.push(format!(
                "the adapters are signed for {}: give --run and --round, without which those of an old round pass for new ones",
                first.occasion
            ));
        }
        Ok((all, warnings))
    }

    fn recovered(&self, dir: &Path) -> Result<Admitted> {
        let Some(chain) = self.signed(dir)? else { return Ok(unsigned()) };
        match (&chain.edge, chain.pruned) {
            (Some(_), _) => self.admit(dir, &chain, Role::Recoverer),
            (None, false) => self.admit(dir, &chain, Role::Edge),
            (None, true) if self.trusted.is_none() => self.admit(dir, &chain, Role::Recoverer),
            (None, true) => Err(Error::file(
                dir,
                format!(
                    "is an adapter of a pruned model and keeps no edge's signature, signed by key {}: expected one that a \
                     trusted recoverer made from a trusted edge's (anabranch recover --trusted FOLDER --key FILE)",
                    chain.signer.short()
                ),
            )),
        }
    }

    /// Lets any signed folder in, as `verify` does: signed by a trusted key of whatever role, or recovered.
    pub fn any(&self, dir: &Path) -> Result<Admitted> {
        let Some(chain) = self.signed(dir)? else { return Err(not_signed(dir)) };
        if chain.edge.is_some() {
            return self.admit(dir, &chain, Role::Recoverer);
        }
        self.admit(dir, &chain, Role::Edge)
            .or_else(|e| self.admit(dir, &chain, Role::Recoverer).map_err(|_| e))
    }

    /// The signatures in `dir`; an error where they or the files are wrong, and where there is none and one is needed.
    fn signed(&self, dir: &Path) -> Result<Option<Chain>> {
        let chain = Chain::open(dir)?;
        if chain.is_none() {
            if self.trusted.is_some() {
                return Err(not_signed(dir));
            }
            if !self.expected.is_empty() {
                let why = format!("has no {MANIFEST} that names a run, expected {}", self.expected);
                return Err(Error::file(dir, why));
            }
        }
        Ok(chain)
    }

    fn admit(&self, dir: &Path, chain: &Chain, role: Role) -> Result<Admitted> {
        let signatory = |path: &Path, key: PublicKey, role: Role| -> Result<Signatory> {
            let name = match &self.trusted {
                None => None,
                Some(trusted) => {
                    Some(trusted.name(&key, role).map_err(|why| Error::file(path, why))?.to_string())
                }
            };
            Ok(Signatory { key, name })
        };
        let signer = signatory(dir, chain.signer, role)?;
        let edge = chain.edge.map(|key| signatory(&dir.join(EDGE), key, Role::Edge)).transpose()?;
        chain.occasion.meets(&self.expected).map_err(|why| Error::file(dir, why))?;
        Ok(Admitted { signer: Some(signer), edge, occasion: chain.occasion.clone(), files: chain.files })
    }
}

fn not_signed(dir: &Path) -> Error {
    Error::file(dir, format!("has no {MANIFEST}: it is not signed, and only signed folders are trusted"))
}

fn unsigned() -> Admitted {
    Admitted { signer: None, edge: None, occasion: Occasion::default(), files: 0 }
}
