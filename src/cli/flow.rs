//! `FLOW.toml`: the whole flow as a file. Its tables take the options of the commands by the same names.

use std::path::{Path, PathBuf};

use clap::{Args, Command, FromArgMatches};
use toml::{Table, Value};

use super::args::{FuseHow, PruneHow, ShapeArgs, TrainHow};
use super::plan;
use super::size::ByteSize;
use crate::checkpoint::json;
use crate::error::{Error, Result};
use crate::fuse;
use crate::stage::flow::{Edge, Flow, Fusion, Joint, Target, Task};

const TOP: [&str; 10] =
    ["base", "output", "seed", "ratios", "joint", "prune", "train", "edge", "fuse", "task"];

/// The most fusions of a flow: lists multiply.
const MOST_FUSIONS: usize = 1000;

/// Reads the flow at `path`; `seed` is the command line's, which the file's overrides.
pub fn read(path: &Path, seed: u64) -> Result<Flow> {
    let text = String::from_utf8(json::read_bounded(path)?)
        .map_err(|e| Error::file(path, format!("is not UTF-8: {e}")))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    parse(path, folder, &text, seed)
}

/// Reads `text`; paths in it are relative to `folder`, and `path` is for the errors' text.
pub fn parse(path: &Path, folder: &Path, text: &str, seed: u64) -> Result<Flow> {
    let file = Reader { path, folder };
    let table: Table = text
        .parse()
        .map_err(|e: toml::de::Error| Error::file(path, format!("is no TOML: {}", e.message())))?;
    file.known("", &table, &TOP)?;
    let seed = match table.get("seed") {
        Some(v) => file.integer("seed", v)? as u64,
        None => seed,
    };
    let ratios = match table.get("ratios") {
        Some(v) => file.list("ratios", v)?.iter().map(|v| file.ratio("ratios", v)).collect::<Result<_>>()?,
        None => Vec::new(),
    };
    let prune_table = file.table(&table, "prune")?;
    let train_table = file.table(&table, "train")?;
    let (mut how, shape): (TrainHow, ShapeArgs) = {
        let matches =
            file.options("train", &train_table, |c| ShapeArgs::augment_args(TrainHow::augment_args(c)))?;
        (
            file.typed("train", TrainHow::from_arg_matches(&matches))?,
            file.typed("train", ShapeArgs::from_arg_matches(&matches))?,
        )
    };
    let mut prune: PruneHow = {
        let matches = file.options("prune", &prune_table, PruneHow::augment_args)?;
        file.typed("prune", PruneHow::from_arg_matches(&matches))?
    };
    for given in [&mut prune.calibration, &mut how.val, &mut how.init_adapter].into_iter().flatten() {
        *given = folder.join(&given);
    }
    let edges = file.tables(&table, "edge")?.iter().map(|t| file.edge(t)).collect::<Result<Vec<_>>>()?;
    if edges.is_empty() {
        return Err(Error::file(path, "has no [[edge]], expected at least one"));
    }
    for (n, edge) in edges.iter().enumerate() {
        if edges[..n].iter().any(|e| e.name == edge.name) {
            return Err(Error::file(path, format!("two edges are called {:?}", edge.name)));
        }
        if edge.target.is_none() && ratios.is_empty() {
            let why = format!("edge {:?} has neither ratio nor memory, and there are no ratios", edge.name);
            return Err(Error::file(path, why));
        }
    }
    let names: Vec<&str> = edges.iter().map(|e| e.name.as_str()).collect();
    let mut fusions = Vec::new();
    for t in file.tables(&table, "fuse")? {
        file.fusions(&mut fusions, t, &names)?;
    }
    let mut tasks = Vec::new();
    for t in file.tables(&table, "task")? {
        file.known("task.", t, &["name", "file", "edges", "fusions", "pruned"])?;
        let name = file.text("task.name", file.required("task", t, "name")?)?;
        if name.is_empty() || name.starts_with('.') || name.contains(|c: char| c == '/' || c.is_control()) {
            let why = format!("task.name is {name:?}, expected a name that a folder can have");
            return Err(Error::file(path, why));
        }
        let all: Vec<usize> = (0..names.len()).collect();
        tasks.push(Task {
            name,
            file: file.at("task.file", file.required("task", t, "file")?)?,
            edges: t.get("edges").map_or(Ok(all), |v| file.members("task.edges", v, &names))?,
            fusions: file.boolean("task.fusions", t.get("fusions"), true)?,
            pruned: file.boolean("task.pruned", t.get("pruned"), false)?,
        });
    }
    let joint = file.boolean("joint", table.get("joint"), false)?;
    Ok(Flow {
        base: file.at("base", file.required("", &table, "base")?)?,
        output: file.at("output", file.required("", &table, "output")?)?,
        seed,
        ratios,
        joint: if joint { Joint::All } else { Joint::None },
        prune: plan::prune_template(&prune, &shape),
        train: plan::train_template(&how, &shape)?,
        edges,
        fusions,
        tasks,
    })
}

/// Where the file is, for paths in it and for errors.
struct Reader<'a> {
    path: &'a Path,
    folder: &'a Path,
}

impl Reader<'_> {
    fn wrong(&self, key: &str, found: &Value, expected: &str) -> Error {
        Error::file(self.path, format!("{key} is {found}, expected {expected}"))
    }

    fn boolean(&self, key: &str, value: Option<&Value>, default: bool) -> Result<bool> {
        match value {
            None => Ok(default),
            Some(Value::Boolean(b)) => Ok(*b),
            Some(v) => Err(self.wrong(key, v, "true or false")),
        }
    }

    /// Fails at the first key that is none of `keys`, with the nearest one.
    fn known(&self, prefix: &str, table: &Table, keys: &[&str]) -> Result<()> {
        let Some(key) = table.keys().find(|k| !keys.contains(&k.as_str())) else { return Ok(()) };
        let near = keys
            .iter()
            .map(|k| (strsim::jaro_winkler(k, key), k))
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .filter(|(likeness, _)| *likeness > 0.7);
        let hint = match near {
            Some((_, k)) => format!("did you mean {k:?}?"),
            None => format!("expected one of {}", keys.join(", ")),
        };
        Err(Error::file(self.path, format!("has an unknown key {prefix}{key}: {hint}")))
    }

    fn required<'t>(&self, of: &str, table: &'t Table, key: &str) -> Result<&'t Value> {
        let place = if of.is_empty() { String::new() } else { format!("[[{of}]] ") };
        table.get(key).ok_or_else(|| Error::file(self.path, format!("{place}has no {key}")))
    }

    fn text(&self, key: &str, v: &Value) -> Result<String> {
        v.as_str().map(str::to_string).ok_or_else(|| self.wrong(key, v, "a text"))
    }

    fn integer(&self, key: &str, v: &Value) -> Result<i64> {
        v.as_integer().filter(|n| *n >= 0).ok_or_else(|| self.wrong(key, v, "a whole number of at least 0"))
    }

    fn ratio(&self, key: &str, v: &Value) -> Result<f64> {
        v.as_float()
            .filter(|r| *r > 0.0 && *r < 1.0)
            .ok_or_else(|| self.wrong(key, v, "a ratio between 0 and 1, like 0.6"))
    }

    fn list<'t>(&self, key: &str, v: &'t Value) -> Result<&'t [Value]> {
        v.as_array().map(Vec::as_slice).ok_or_else(|| self.wrong(key, v, "a list"))
    }

    fn at(&self, key: &str, v: &Value) -> Result<PathBuf> {
        Ok(self.folder.join(self.text(key, v)?))
    }

    fn table(&self, table: &Table, key: &str) -> Result<Table> {
        match table.get(key) {
            None => Ok(Table::new()),
            Some(Value::Table(t)) => Ok(t.clone()),
            Some(v) => Err(self.wrong(key, v, "a table")),
        }
    }

    fn tables<'t>(&self, table: &'t Table, key: &str) -> Result<Vec<&'t Table>> {
        let Some(v) = table.get(key) else { return Ok(Vec::new()) };
        let wrong = || self.wrong(key, v, &format!("tables written as [[{key}]]"));
        v.as_array().ok_or_else(wrong)?.iter().map(|v| v.as_table().ok_or_else(wrong)).collect()
    }

    /// Reads a table as the options of a command.
    fn options(
        &self,
        name: &'static str,
        table: &Table,
        augment: impl Fn(Command) -> Command,
    ) -> Result<clap::ArgMatches> {
        let command = augment(Command::new(name).no_binary_name(true).disable_help_flag(true));
        let longs = option_names(&command);
        let longs: Vec<&str> = longs.iter().map(String::as_str).collect();
        // Options are written with - on the command line and with _ in TOML; either is taken.
        let table: Table = table.iter().map(|(k, v)| (k.replace('-', "_"), v.clone())).collect();
        self.known(&format!("{name}."), &table, &longs)?;
        let mut words = Vec::new();
        for (key, value) in &table {
            let flag = format!("--{}", key.replace('_', "-"));
            match value {
                Value::Boolean(true) => words.push(flag),
                Value::Boolean(false) => {}
                Value::Array(list) => {
                    let list: Vec<String> = list.iter().map(word).collect();
                    words.push(format!("{flag}={}", list.join(",")));
                }
                other => words.push(format!("{flag}={}", word(other))),
            }
        }
        self.typed(name, command.try_get_matches_from(words))
    }

    fn typed<T>(&self, name: &str, result: Result<T, clap::Error>) -> Result<T> {
        result.map_err(|e| {
            let text = e.to_string();
            let first = text.lines().next().unwrap_or_default();
            Error::file(self.path, format!("[{name}]: {}", first.trim_start_matches("error: ")))
        })
    }

    fn edge(&self, t: &Table) -> Result<Edge> {
        self.known("edge.", t, &["name", "data", "val", "memory", "ratio"])?;
        let name = self.text("edge.name", self.required("edge", t, "name")?)?;
        let plain = |c: char| c.is_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || !name.chars().all(plain) {
            let why = format!("edge.name is {name:?}, expected letters, digits, - and _: it names folders");
            return Err(Error::file(self.path, why));
        }
        let data = match self.required("edge", t, "data")? {
            Value::Array(list) => list.iter().map(|v| self.at("edge.data", v)).collect::<Result<_>>()?,
            one => vec![self.at("edge.data", one)?],
        };
        let target = match (t.get("memory"), t.get("ratio")) {
            (Some(_), Some(_)) => {
                let why = format!("edge {name:?} has both memory and ratio, expected one");
                return Err(Error::file(self.path, why));
            }
            (Some(v), None) => {
                let size: ByteSize = self
                    .text("edge.memory", v)?
                    .parse()
                    .map_err(|e: String| Error::file(self.path, format!("edge.memory: {e}")))?;
                Some(Target::Memory(size.0))
            }
            (None, Some(v)) => Some(Target::Ratio(self.ratio("edge.ratio", v)?)),
            (None, None) => None,
        };
        let val = t.get("val").map(|v| self.at("edge.val", v)).transpose()?;
        Ok(Edge { name, data, val, target })
    }

    fn members(&self, key: &str, v: &Value, names: &[&str]) -> Result<Vec<usize>> {
        let list = self.list(key, v)?;
        let mut out = Vec::with_capacity(list.len());
        for v in list {
            let name = self.text(key, v)?;
            let at = names.iter().position(|n| *n == name).ok_or_else(|| {
                Error::file(self.path, format!("{key} names {name:?}, the edges are {}", names.join(", ")))
            })?;
            if !out.contains(&at) {
                out.push(at);
            }
        }
        out.sort_unstable();
        Ok(out)
    }

    /// Every combination of the lists in one `[[fuse]]`, for every set of edges that it names.
    fn fusions(&self, out: &mut Vec<Fusion>, t: &Table, names: &[&str]) -> Result<()> {
        let mut keys = option_names(&FuseHow::augment_args(Command::new("fuse")));
        keys.extend(["edges".to_string(), "pairs".to_string()]);
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        let underscored = t.iter().map(|(k, v)| (k.replace('-', "_"), v.clone())).collect();
        self.known("fuse.", &underscored, &keys)?;
        let mut t = t.clone();
        let edges = t.remove("edges").map(|v| self.members("fuse.edges", &v, names)).transpose()?;
        let pairs = match t.remove("pairs") {
            None => false,
            Some(Value::Boolean(b)) => b,
            Some(v) => return Err(self.wrong("fuse.pairs", &v, "true or false")),
        };
        let all = edges.unwrap_or_else(|| (0..names.len()).collect());
        let sets: Vec<Vec<usize>> = if pairs {
            (0..all.len())
                .flat_map(|i| (i + 1..all.len()).map(move |j| (i, j)))
                .map(|(i, j)| vec![all[i], all[j]])
                .collect()
        } else {
            vec![all]
        };
        if sets.iter().all(Vec::is_empty) {
            let why = "has a [[fuse]] of no edges: edges names at least one, pairs = true needs two";
            return Err(Error::file(self.path, why));
        }
        let choices = |(key, value): (&String, &Value)| match value {
            Value::Array(list) if key != "weights" => list.len(),
            _ => 1,
        };
        let made = t.iter().map(choices).fold(sets.len(), usize::saturating_mul);
        if out.len().saturating_add(made) > MOST_FUSIONS {
            let why =
                format!("has a [[fuse]] that makes {made} fusions, expected at most {MOST_FUSIONS} in all");
            return Err(Error::file(self.path, why));
        }
        let mut combinations = vec![Table::new()];
        for (key, value) in &t {
            let choices: Vec<Value> = match value {
                Value::Array(list) if key != "weights" => list.clone(),
                one => vec![one.clone()],
            };
            combinations = combinations
                .into_iter()
                .flat_map(|c| {
                    choices.iter().map(move |v| {
                        let mut c = c.clone();
                        c.insert(key.clone(), v.clone());
                        c
                    })
                })
                .collect();
        }
        for set in sets {
            for c in &combinations {
                let matches = self.options("fuse", c, FuseHow::augment_args)?;
                let how = self.typed("fuse", FuseHow::from_arg_matches(&matches))?;
                let options = plan::fuse_template(&how)?;
                self.fits_flow(&options.recipe.fusion)?;
                out.push(Fusion { edges: set.clone(), name: fusion_name(c), options });
            }
        }
        Ok(())
    }

    /// An error, before anything is pruned, for a method whose result no adapter holds or that needs what no stage
    /// makes.
    fn fits_flow(&self, fusion: &fuse::Fusion) -> Result<()> {
        let method = fusion.method;
        let why = if !fusion.has_factors() {
            "gives a result of full rank, and a flow's fusions are adapters: rank = N approximates it; `anabranch fuse \
             --merged` with --model writes it into the base's weights"
        } else if method.needs_input_grams() {
            "needs --grams, which no stage of a flow makes; `anabranch grams` and `anabranch fuse` do"
        } else {
            return Ok(());
        };
        Err(Error::file(self.path, format!("has a [[fuse]] with method = \"{method}\", which {why}")))
    }
}

/// The names of a command's options, with `_`.
fn option_names(command: &Command) -> Vec<String> {
    command.get_arguments().filter_map(|a| a.get_long().map(|l| l.replace('-', "_"))).collect()
}

/// A value as it would be typed.
fn word(v: &Value) -> String {
    match v {
        Value::String(s) => s.clone(),
        other => other.to_string(),
    }
}

/// `fedsa-sum+lora-cr`: the method, what it is told besides, and the resolution; it names a folder and a column.
fn fusion_name(options: &Table) -> String {
    let get = |key: &str| options.get(key).map(word);
    let mut name = get("method").unwrap_or_default();
    for (key, value) in options {
        match key.as_str() {
            "method" | "resolve" => {}
            "fedsa" => name.push_str(&format!("-{}", word(value))),
            key => name.push_str(&format!("-{key}-{}", word(value))),
        }
    }
    if let Some(resolve) = get("resolve").filter(|r| r != "none") {
        name.push_str(&format!("+{resolve}"));
    }
    name.chars().map(|c| if c.is_alphanumeric() || "+-_.".contains(c) { c } else { '-' }).collect()
}
