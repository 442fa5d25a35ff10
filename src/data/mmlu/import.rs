//! MMLU as it is spread: the authors' CSV folders, Hugging Face's parquet folders, or JSON lines, as canonical rows.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use super::parquet;
use super::rows::{self, ROWS, Row, Split};
use crate::checkpoint::digest::{self, Hasher};
use crate::data::{lines, tasks};
use crate::error::{Error, Result};

/// Folders below the one that is named: `data/test` of the authors' archive, `<subject>/test` of a converted one.
const DEPTH: usize = 4;
/// Questions of other data sets, without subjects, that MMLU has for training.
const AUXILIARY: &str = "auxiliary_train";
/// The folder in which Hugging Face has the rows of all subjects' folders once more.
const ALL: &str = "all";

/// What was read.
#[derive(Clone, Debug)]
pub struct Import {
    /// By subject, split, and their order in the files; no two have one id.
    pub rows: Vec<Row>,
    /// The files that they are from.
    pub files: Vec<PathBuf>,
    /// What was not read, and why.
    pub left_out: Vec<String>,
    /// SHA-256 over the files' bytes.
    pub digest: String,
}

/// What a file's name says it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Csv,
    Parquet,
    Json,
}

impl Kind {
    fn of(path: &Path) -> Option<Kind> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "csv" => Some(Kind::Csv),
            "parquet" => Some(Kind::Parquet),
            "jsonl" | "ndjson" => Some(Kind::Json),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Csv => "CSV",
            Kind::Parquet => "parquet",
            Kind::Json => "JSONL",
        }
    }
}

/// Reads `path`, a file or a folder of
/// - `SUBJECT_dev.csv`, `SUBJECT_val.csv`, `SUBJECT_test.csv`, in one folder or in one for each split,
/// - `SUBJECT/SPLIT-….parquet`, or parquet files of several subjects,
/// - JSON lines with `question`, `choices`, `answer` and, unless a file's name is `SUBJECT_SPLIT` or `SPLIT`,
///   `subject` and `split`; optional `id` and `domains`.
///
/// A row without an id is called `SUBJECT/SPLIT/NUMBER`. Files that are copies of one another, files of two forms, a
/// row that is bad in any way, and a folder without rows are errors.
pub fn read(path: &Path) -> Result<Import> {
    let found = find(path)?;
    let (files, left_out) = chosen(path, found)?;
    let digest = digest_of(&files)?;
    let mut read = Vec::new();
    for file in &files {
        let of_file = match Kind::of(file) {
            Some(Kind::Csv) => csv(file)?,
            Some(Kind::Parquet) => of_parquet(file)?,
            Some(Kind::Json) | None => json(file)?,
        };
        read.extend(of_file.into_iter().map(|(row, has_id)| Read { row, has_id, file }));
    }
    if read.is_empty() {
        return Err(Error::file(path, "has no rows"));
    }
    let rows = in_order(read)?;
    Ok(Import { rows, files, left_out, digest })
}

/// SHA-256 over the files' bytes, no two of which are the same.
fn digest_of(files: &[PathBuf]) -> Result<String> {
    let mut hasher = Hasher::default();
    let mut hashes: HashMap<String, &Path> = HashMap::new();
    for file in files {
        let hash = digest::sha256_file(file)?;
        hasher.update(hash.as_bytes());
        if let Some(first) = hashes.insert(hash, file) {
            let why = format!("is a copy of {}, byte for byte: remove one of them", first.display());
            return Err(Error::file(file, why));
        }
    }
    Ok(hasher.finish())
}

/// A row, whether it came with an id, and its file.
struct Read<'a> {
    row: Row,
    has_id: bool,
    file: &'a Path,
}

/// All files of the three kinds in the folder `path`, by name; or `path` itself, whatever kind it is. The folder of an
/// earlier import is its canonical file.
fn find(path: &Path) -> Result<Vec<(Kind, PathBuf)>> {
    let whole = path.join(ROWS);
    let file: &Path = if whole.is_file() { &whole } else { path };
    if !std::fs::metadata(file).map_err(Error::io(file))?.is_dir() {
        let why = "is no folder, and its name ends neither in .csv nor in .parquet nor in .jsonl";
        let kind = Kind::of(file).ok_or_else(|| Error::file(file, why))?;
        return Ok(vec![(kind, file.to_path_buf())]);
    }
    let mut found = Vec::new();
    walk(path, DEPTH, &mut found)?;
    match found.is_empty() {
        true => Err(Error::file(path, "holds no .csv, .parquet or .jsonl file")),
        false => Ok(found),
    }
}

fn walk(dir: &Path, depth: usize, found: &mut Vec<(Kind, PathBuf)>) -> Result<()> {
    let entries = std::fs::read_dir(dir).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let mut paths: Vec<PathBuf> = entries.map_err(Error::io(dir))?.into_iter().map(|e| e.path()).collect();
    paths.sort();
    for path in paths {
        if path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".")) {
            continue;
        }
        // Links are followed: a downloaded snapshot is a folder of them.
        if std::fs::metadata(&path).map_err(Error::io(&path))?.is_dir() {
            if depth > 0 {
                walk(&path, depth - 1, found)?;
            }
        } else if let Some(kind) = Kind::of(&path) {
            found.push((kind, path));
        }
    }
    Ok(())
}

/// Those of `found` that are MMLU's rows, and what the others are. An error if they are not of one kind.
fn chosen(root: &Path, found: Vec<(Kind, PathBuf)>) -> Result<(Vec<PathBuf>, Vec<String>)> {
    let inside = |path: &Path, folder: &str| {
        path.strip_prefix(root).is_ok_and(|p| p.parent().is_some_and(|p| p.iter().any(|part| part == folder)))
    };
    let mut left_out = Vec::new();
    let mut leave = |what: Vec<PathBuf>, why: &str| {
        if let Some(first) = what.first() {
            left_out.push(format!("{} ({} files): {why}", first.display(), what.len()));
        }
    };
    let is_auxiliary = |path: &Path| {
        inside(path, AUXILIARY) || split_word(path).1.is_some_and(|w| w == "train" || w == AUXILIARY)
    };
    let (auxiliary, found): (Vec<_>, Vec<_>) = found.into_iter().partition(|(_, path)| is_auxiliary(path));
    leave(auxiliary.into_iter().map(|f| f.1).collect(), "rows for training, which have no subjects");
    let is_all = |path: &Path| inside(path, ALL);
    let twice = found.iter().any(|(_, path)| !is_all(path));
    let (all, found): (Vec<_>, Vec<_>) = found.into_iter().partition(|(_, path)| twice && is_all(path));
    leave(all.into_iter().map(|f| f.1).collect(), "the rows of the other folders once more");
    if let Some((kind, other)) = found.iter().find(|(kind, _)| *kind != found[0].0) {
        let why = format!(
            "holds {} files ({}) and {} files ({}): name the folder of one form",
            found[0].0.name(),
            found[0].1.display(),
            kind.name(),
            other.display()
        );
        return Err(Error::file(root, why));
    }
    match found.is_empty() {
        true => Err(Error::file(root, format!("has no rows of MMLU: {}", left_out.join("; ")))),
        false => Ok((found.into_iter().map(|f| f.1).collect(), left_out)),
    }
}

/// The subject and the word for the split that a file's name has (`SUBJECT_SPLIT`, `SPLIT`, either with the number of a
/// shard), or its folder's (`SPLIT/SUBJECT`). The subject is empty where the name has none.
fn split_word(path: &Path) -> (String, Option<String>) {
    let words = ["dev", "val", "validation", "test", "train", AUXILIARY];
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let stem = match stem.split_once('-') {
        Some((before, shard)) if shard.chars().all(|c| c.is_ascii_digit() || "-of".contains(c)) => before,
        _ => &stem,
    };
    let own = words.iter().find_map(|word| {
        let before = stem.strip_suffix(word)?;
        let subject = if before.is_empty() { Some("") } else { before.strip_suffix('_') };
        subject.map(|s| (s.to_string(), Some(word.to_string())))
    });
    let folder = || path.parent()?.file_name()?.to_str().filter(|name| words.contains(name));
    own.unwrap_or_else(|| (stem.to_string(), folder().map(String::from)))
}

/// What a file's name says of its rows.
fn told(path: &Path) -> (Option<String>, Option<Split>) {
    let (subject, word) = split_word(path);
    (Some(subject).filter(|s| !s.is_empty()), word.and_then(|w| Split::parse(&w)))
}

fn csv(path: &Path) -> Result<Vec<(Row, bool)>> {
    let (Some(subject), Some(split)) = told(path) else {
        let why = "its name tells no subject and split, expected SUBJECT_dev.csv, SUBJECT_val.csv or SUBJECT_test.csv";
        return Err(Error::file(path, why));
    };
    let items = tasks::load(path)?.items.into_iter().map(|mut item| {
        item.subject = Some(subject.clone());
        Ok((Row::new(item, split).map_err(|why| Error::file(path, why))?, false))
    });
    items.collect()
}

fn of_parquet(path: &Path) -> Result<Vec<(Row, bool)>> {
    let (_, Some(split)) = told(path) else {
        let why = "its name tells no split, expected dev-….parquet, validation-….parquet or test-….parquet";
        return Err(Error::file(path, why));
    };
    let items = parquet::items(path)?.into_iter().map(|item| {
        let number = item.id.clone();
        let row = Row::new(item, split).map_err(|why| Error::file(path, format!("row {number}: {why}")))?;
        Ok((row, false))
    });
    items.collect()
}

fn json(path: &Path) -> Result<Vec<(Row, bool)>> {
    let (subject, split) = told(path);
    // Without a split in it, a name is the data set's.
    let subject = subject.filter(|_| split.is_some());
    let rows = rows::of_lines(path, &lines::read_text(path)?, subject.as_deref(), split)?;
    Ok(rows.into_iter().map(|(_, row)| row).collect())
}

/// By subject, split and then as read, with ids for those that had none. An error if a subject's split is in two
/// folders, or in two CSV files, or if two rows have one id.
fn in_order(mut read: Vec<Read>) -> Result<Vec<Row>> {
    let mut places: BTreeMap<(&str, Split), &Path> = BTreeMap::new();
    for &Read { ref row, file, .. } in &read {
        let first = *places.entry((row.subject(), row.split)).or_insert(file);
        let shards = first.parent() == file.parent() && Kind::of(file) != Some(Kind::Csv);
        if first != file && !shards {
            let (subject, split) = (row.subject(), row.split.name());
            let why = format!("has {split} rows of {subject}, as {} has: keep one of them", first.display());
            return Err(Error::file(file, why));
        }
    }
    read.sort_by(|a, b| (a.row.subject(), a.row.split).cmp(&(b.row.subject(), b.row.split)));
    let mut number = 0;
    for n in 0..read.len() {
        let same = |a: &Row, b: &Row| (a.subject(), a.split) == (b.subject(), b.split);
        number = if n > 0 && same(&read[n - 1].row, &read[n].row) { number + 1 } else { 0 };
        if !read[n].has_id {
            let row = &mut read[n].row;
            row.item.id = format!("{}/{}/{number}", row.subject(), row.split.name());
        }
    }
    let mut ids: HashMap<&str, &Path> = HashMap::new();
    for &Read { ref row, file, .. } in &read {
        if let Some(first) = ids.insert(&row.item.id, file) {
            let place =
                if first == file { "twice".into() } else { format!("and in {} too", first.display()) };
            return Err(Error::file(file, format!("has the id {:?} {place}", row.item.id)));
        }
    }
    Ok(read.into_iter().map(|r| r.row).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The folder of `files`.
    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        dir
    }

    fn ids(import: &Import) -> Vec<&str> {
        import.rows.iter().map(|r| r.item.id.as_str()).collect()
    }

    const ROW: &str = "q,1,2,3,4,A\n";
    const JSON: &str =
        r#"{"question": "q", "choices": ["1", "2", "3", "4"], "answer": "B", "subject": "anatomy"}"#;

    #[test]
    fn the_authors_folders() {
        let two = format!("{ROW}r,1,2,3,4,B\n");
        let files = [
            ("data/test/anatomy_test.csv", two.as_str()),
            ("data/val/anatomy_val.csv", ROW),
            ("data/dev/sociology_dev.csv", "s,1,2,3,4,A\n"),
            ("data/auxiliary_train/race.csv", "t,1,2,3,4,A\n"),
            ("data/.hidden/x_test.csv", "t,1,2\n"),
            ("README.txt", "no rows"),
        ];
        let dir = folder(&files);
        for root in [dir.path().to_path_buf(), dir.path().join("data")] {
            let import = read(&root).unwrap();
            assert_eq!(
                ids(&import),
                ["anatomy/validation/0", "anatomy/test/0", "anatomy/test/1", "sociology/dev/0"]
            );
            assert_eq!(import.rows[3].item.domains, ["sc"]);
            assert_eq!((import.files.len(), import.left_out.len()), (3, 1));
            assert!(import.left_out[0].contains("race.csv"), "{:?}", import.left_out);
        }
        // A folder for each split tells the split, where the name does not.
        let plain = folder(&[("test/anatomy.csv", ROW)]);
        assert_eq!(ids(&read(plain.path()).unwrap()), ["anatomy/test/0"]);
        assert_eq!(
            ids(&read(&dir.path().join("data/val/anatomy_val.csv")).unwrap()),
            ["anatomy/validation/0"]
        );
    }

    #[test]
    fn json_lines_say_or_are_told_what_they_are_of() {
        let with = JSON.replace('}', ", \"split\": \"val\", \"id\": \"mine\", \"domains\": [\"x\"]}");
        let dir = folder(&[(
            "mmlu/rows.jsonl",
            &format!("{with}\n\n{}\n", JSON.replace('}', ", \"split\": \"dev\"}")),
        )]);
        let import = read(dir.path()).unwrap();
        assert_eq!(ids(&import), ["anatomy/dev/0", "mine"]);
        assert_eq!(
            (import.rows[1].split, &import.rows[1].item.domains[..]),
            (Split::Validation, &["x".into()][..])
        );
        let dir = folder(&[("test.jsonl", JSON), ("dev.jsonl", &JSON.replace("\"q\"", "\"r\""))]);
        assert_eq!(ids(&read(dir.path()).unwrap()), ["anatomy/dev/0", "anatomy/test/0"]);
        let bare = r#"{"question": "q", "choices": ["1", "2", "3", "4"], "answer": 0}"#;
        let dir = folder(&[("virology_test.jsonl", bare)]);
        assert_eq!(ids(&read(dir.path()).unwrap()), ["virology/test/0"]);
    }

    #[test]
    fn parquet_folders_with_and_without_the_whole_beside_them() {
        let hub = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/mmlu/hub"));
        let import = read(hub).unwrap();
        assert_eq!((import.rows.len(), import.files.len()), (14, 6));
        assert_eq!(ids(&import)[..3], ["anatomy/dev/0", "anatomy/dev/1", "anatomy/validation/0"]);
        let dir = tempfile::tempdir().unwrap();
        for (from, to) in
            [("anatomy/test", "anatomy"), ("sociology/test", "all"), ("sociology/dev", AUXILIARY)]
        {
            std::fs::create_dir(dir.path().join(to)).unwrap();
            let name = format!("{from}-00000-of-00001.parquet");
            let split = from.rsplit('/').next().unwrap();
            std::fs::copy(
                hub.join(name),
                dir.path().join(to).join(format!("{split}-00000-of-00001.parquet")),
            )
            .unwrap();
        }
        let import = read(dir.path()).unwrap();
        assert_eq!(ids(&import), ["anatomy/test/0", "anatomy/test/1", "anatomy/test/2"]);
        assert_eq!(import.left_out.len(), 2);
        assert_eq!(read(&dir.path().join(ALL)).unwrap().rows[0].subject(), "sociology");
    }

    #[test]
    fn the_same_rows_in_any_form_are_the_same_import() {
        let hub = read(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/mmlu/hub"))).unwrap();
        let dir = tempfile::tempdir().unwrap();
        for row in &hub.rows {
            let path = dir.path().join(format!("{}_{}.csv", row.subject(), row.split.name()));
            let file = std::fs::File::options().append(true).create(true).open(path).unwrap();
            let mut writer = csv::Writer::from_writer(file);
            writer.write_record(tasks::csv_record(&row.item).unwrap()).unwrap();
        }
        assert_eq!(read(dir.path()).unwrap().rows, hub.rows);
        let lines = tempfile::tempdir().unwrap();
        std::fs::write(lines.path().join("all.jsonl"), rows::text(&hub.rows)).unwrap();
        assert_eq!(read(lines.path()).unwrap().rows, hub.rows);
    }

    #[test]
    fn bad_folders_are_named() {
        let many = |files: &[(&str, &str)]| read(folder(files).path()).unwrap_err().to_string();
        for (files, expected) in [
            (&[][..], "holds no .csv, .parquet or .jsonl file"),
            (&[("a.txt", "x")], "holds no .csv"),
            (&[("anatomy.csv", ROW)], "tells no subject and split"),
            (&[("test.csv", ROW)], "tells no subject and split"),
            (&[("cooking_test.csv", ROW)], "subject cooking is none of MMLU's 57"),
            (&[("anatomy_test.csv", ROW), ("virology_test.csv", ROW)], "is a copy of"),
            (
                &[("anatomy_test.csv", ROW), ("old/anatomy_test.csv", "r,1,2,3,4,A\n")],
                "has test rows of anatomy, as",
            ),
            (&[("anatomy_val.csv", ROW), ("anatomy_validation.csv", "r,1,2,3,4,A\n")], "has validation rows"),
            (&[("anatomy_test.csv", ROW), ("x_test.jsonl", JSON)], "holds CSV files"),
            (&[("auxiliary_train/race.csv", ROW)], "has no rows of MMLU"),
            (&[("anatomy_test.csv", "q,1,2,3,A\n")], "line 1: has 5 columns, expected 6"),
            (&[("anatomy_test.csv", "q,1,2,3,,A\n")], "line 1: option D is empty"),
            (&[("anatomy_test.csv", "q,1,2,3,4,E\n")], "the answer is \"E\""),
            (&[("anatomy_test.csv", "\"q\n,1,2,3,4,A\n")], "line 1: has 1 columns"),
            (&[("a.jsonl", JSON)], "line 1: has no split"),
            (&[("a_test.jsonl", "\n")], "has no rows"),
            (&[("b.parquet", "PAR1")], "its name tells no split"),
            (&[("test-00000-of-00001.parquet", "PAR1")], "is no parquet file"),
            (&[("test-00000-of-00001.parquet", "")], "is no parquet file"),
        ] {
            let err = many(files);
            assert!(err.contains(expected), "{files:?}: {err}");
        }
        let id = JSON.replace('}', ", \"id\": 1}");
        assert!(many(&[("a_test.jsonl", &format!("{id}\n{id}"))]).contains("has the id \"1\" twice"));
        let latin = folder(&[]);
        std::fs::write(latin.path().join("anatomy_test.csv"), b"caf\xe9,1,2,3,4,A\n").unwrap();
        let err = read(latin.path()).unwrap_err().to_string();
        assert!(err.contains("anatomy_test.csv: line 1: byte 0xe9 is not UTF-8"), "{err}");
        assert!(read(&latin.path().join("none")).unwrap_err().to_string().contains("none"));
        let file = latin.path().join("notes.txt");
        std::fs::write(&file, "x").unwrap();
        assert!(read(&file).unwrap_err().to_string().contains("ends neither in .csv"));
    }
}
