//! MMLU from its forms to edges' data, to evaluation, and to lm-evaluation-harness's form.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use anabranch::checkpoint::provenance::Provenance;
use anabranch::data::documents;
use anabranch::data::tokenizer::Tokenizer;
use anabranch::stage::common::Common;
use anabranch::stage::data::import::{self, ImportOptions};
use anabranch::stage::data::split::{self, SplitOptions, SplitReport};
use anabranch::stage::evaluate::items::Items;
use assert_cmd::Command;
use predicates::str::contains;
use serde_json::Value;
use tempfile::TempDir;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn anabranch(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_anabranch"));
    command.env("CUDA_VISIBLE_DEVICES", "").args(args);
    command
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn lines(path: &Path) -> Vec<Value> {
    text(path).lines().map(|line| serde_json::from_str(line).expect("a JSON line")).collect()
}

fn shown(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// A question without anything that tells copies of it apart.
fn question(row: &Value) -> String {
    let mut options: Vec<String> =
        row["choices"].as_array().unwrap().iter().map(|c| c.to_string().to_lowercase()).collect();
    options.sort();
    let words = format!("{} {}", row["question"], options.join(" ")).to_lowercase().replace("\\n", " ");
    words.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// MMLU in its authors' layout: of four subjects in three domains, with a question of each subject twice in validation and
/// twice in test.
fn csv_folder() -> TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    for (subject, test) in [("anatomy", 23), ("virology", 9), ("sociology", 41), ("econometrics", 3)] {
        for (split, rows) in [("dev", 5), ("val", 4), ("test", test)] {
            let path = dir.path().join(split).join(format!("{subject}_{split}.csv"));
            std::fs::create_dir_all(path.parent().unwrap()).expect("a folder");
            let mut writer = csv::Writer::from_path(path).expect("a file");
            for n in 0..rows {
                let copy = split != "dev" && (n == 0 || n == 2);
                let asked = if copy {
                    format!("{subject}, \"twice\"\nor more?")
                } else {
                    format!("{subject} {split} {n}?")
                };
                let choices =
                    ["w", "x", "y", "z"].map(|c| if copy { c.to_string() } else { format!("{c}{n}") });
                let [a, b, c, d] = &choices;
                writer
                    .write_record([asked.as_str(), a, b, c, d, ["A", "B", "C", "D"][n % 4]])
                    .expect("a row");
            }
        }
    }
    dir
}

/// Imported and cut, without a command line.
fn cut(data: &Path, dir: &Path, seed: u64, allow_duplicates: bool) -> (SplitReport, PathBuf) {
    let imported = dir.join("mmlu");
    if !imported.exists() {
        let options = ImportOptions { path: data.into(), out: imported.clone() };
        import::run(&options, &Common::default()).expect("an import");
    }
    let out = dir.join(format!("edges-{seed}-{allow_duplicates}"));
    let options = SplitOptions { dir: imported, out: out.clone(), allow_duplicates };
    (split::run(&options, &Common { seed, ..Common::default() }).expect("a cut"), out)
}

/// The canonical row of each line of a domain's three parts.
fn parts(dir: &Path, edges: &Path, domain: &str) -> [Vec<Value>; 3] {
    let rows: HashMap<String, Value> = lines(&dir.join("mmlu/mmlu.jsonl"))
        .into_iter()
        .map(|row| (row["id"].as_str().unwrap().to_string(), row))
        .collect();
    let files = [
        edges.join(format!("{domain}.train.jsonl")),
        edges.join(format!("tasks/{domain}_val.jsonl")),
        edges.join(format!("tasks/{domain}_test.jsonl")),
    ];
    files.map(|file| lines(&file).iter().map(|line| rows[line["id"].as_str().unwrap()].clone()).collect())
}

/// Questions that are on more than one side.
fn leaks(parts: &[Vec<Value>; 3]) -> usize {
    let mut sides: HashMap<String, HashSet<usize>> = HashMap::new();
    for (side, rows) in parts.iter().enumerate() {
        for row in rows {
            sides.entry(question(row)).or_default().insert(side);
        }
    }
    sides.values().filter(|s| s.len() > 1).count()
}

#[test]
fn the_paper_s_sizes_from_mmlu_itself() {
    let data = Path::new(ROOT).join("../shared/data/mmlu");
    if !data.exists() {
        println!("skipped: {} is not on this machine", data.display());
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let (report, edges) = cut(&data, dir.path(), 0, false);
    let sizes: Vec<_> =
        report.domains.iter().map(|d| (d.domain.as_str(), d.train, d.validation, d.test, d.rows)).collect();
    assert_eq!(
        sizes[..3],
        [("hum", 4178, 522, 523, 5223), ("sc", 2731, 341, 342, 3414), ("stem", 2790, 348, 350, 3488)]
    );
    let repeated: Vec<_> = report.domains.iter().map(|d| d.repeated).collect();
    assert_eq!(repeated, [1, 22, 18, 95]);
    let (by_chance, leaky) = cut(&data, dir.path(), 0, true);
    assert!(by_chance.domains.iter().all(|d| d.moved == 0));
    let mut leaked = 0;
    for (d, domain) in report.domains.iter().enumerate() {
        let parts_of = |edges| parts(dir.path(), edges, &domain.domain);
        let own = parts_of(&edges);
        assert_eq!(leaks(&own), 0, "{}", domain.domain);
        let ids: HashSet<String> = own.iter().flatten().map(|row| row["id"].to_string()).collect();
        assert_eq!(ids.len(), domain.rows, "every row is in one part");
        assert_eq!(own.each_ref().map(Vec::len), [domain.train, domain.validation, domain.test]);
        leaked += leaks(&parts_of(&leaky));
        assert!(by_chance.domains[d].rows == domain.rows && domain.moved <= 4 * domain.repeated);
    }
    assert!(leaked >= 10, "a cut by chance must leak, or the test above shows nothing: {leaked}");
    println!(
        "moved {:?}, by chance {leaked} questions leak",
        report.domains.iter().map(|d| d.moved).collect::<Vec<_>>()
    );
}

#[test]
fn edges_learn_the_prompts_that_they_are_asked() {
    let (data, dir) = (csv_folder(), tempfile::tempdir().expect("a folder"));
    let (report, edges) = cut(data.path(), dir.path(), 7, false);
    let sizes: Vec<_> = report
        .domains
        .iter()
        .map(|d| (d.domain.as_str(), d.train, d.validation, d.test, d.repeated))
        .collect();
    assert_eq!(sizes, [("sc", 41, 5, 6, 2), ("stem", 21, 2, 4, 1), ("other", 10, 1, 2, 1)]);
    for domain in ["sc", "stem", "other"] {
        assert_eq!(leaks(&parts(dir.path(), &edges, domain)), 0, "{domain}");
    }
    assert_eq!(report.warnings, [""; 0]);

    let base = Path::new(ROOT).join("assets/demo/base");
    let config: Value = serde_json::from_str(&text(&base.join("config.json"))).expect("JSON");
    let tokenizer =
        Tokenizer::load(&base, config["vocab_size"].as_u64().unwrap() as usize).expect("a tokenizer");
    let items = Items::load(&[dir.path().join("mmlu/mmlu.jsonl")], &tokenizer, None, 1 << 20).expect("items");
    let asked: HashMap<&str, (&str, &str)> = items
        .places
        .iter()
        .zip(&items.prompts)
        .map(|(&(task, n), prompt)| {
            let item = &items.tasks[task].items[n];
            (item.id.as_str(), (prompt.context.as_str(), prompt.continuations[item.gold].as_str()))
        })
        .collect();
    let file = edges.join("sc.train.jsonl");
    for line in lines(&file) {
        let (prompt, completion) = asked[line["id"].as_str().unwrap()];
        assert_eq!((line["prompt"].as_str(), line["completion"].as_str()), (Some(prompt), Some(completion)));
    }
    // They are training data as they are.
    let both = [file, edges.join("sc.val.jsonl")];
    assert_eq!(
        documents::load(&both, &tokenizer, 4096, false).expect("training data").documents.len(),
        41 + 5
    );
}

#[test]
fn a_cut_is_its_seed_s() {
    let (data, dir) = (csv_folder(), tempfile::tempdir().expect("a folder"));
    let files = |edges: &Path| Provenance::open(edges).unwrap().unwrap().files;
    let (_, one) = cut(data.path(), dir.path(), 1, false);
    let again = tempfile::tempdir().expect("a folder");
    let (_, same) = cut(&dir.path().join("mmlu/mmlu.jsonl"), again.path(), 1, false);
    assert_eq!(files(&one), files(&same));
    let (_, other) = cut(data.path(), dir.path(), 2, false);
    assert_ne!(files(&one), files(&other));
}

#[test]
fn the_commands_print_what_they_did() {
    let (data, dir) = (csv_folder(), tempfile::tempdir().expect("a folder"));
    let (mmlu, edges) = (dir.path().join("mmlu"), dir.path().join("edges"));
    let import = ["data", "mmlu", "import", shown(data.path()), "--out", shown(&mmlu)];
    anabranch(&import)
        .arg("--dry-run")
        .assert()
        .success()
        .stdout(contains("import 112 rows"))
        .stdout(contains("(new)"));
    assert!(!mmlu.exists());
    anabranch(&import)
        .assert()
        .success()
        .stdout(contains("Social Sciences"))
        .stdout(contains("4 questions stand more than once"));
    anabranch(&import).assert().code(2).stderr(contains("--force"));
    anabranch(&import).arg("--resume").assert().success().stdout(contains("already finished"));
    assert_eq!(lines(&mmlu.join("mmlu.jsonl"))[0]["id"], "anatomy/dev/0");
    assert_eq!(std::fs::read_dir(mmlu.join("dev")).unwrap().count(), 4);
    assert_eq!(text(&mmlu.join("dev/anatomy_dev.csv")), text(&data.path().join("dev/anatomy_dev.csv")));

    let split = ["data", "mmlu", "split", shown(&mmlu), "--out", shown(&edges)];
    anabranch(&split).arg("--dry-run").assert().success().stdout(contains("cut stem into 21, 2 and 4 rows"));
    let done = anabranch(&split).arg("--json").assert().success();
    let report: Value = serde_json::from_slice(&done.get_output().stdout).expect("JSON");
    let moved: u64 = report["domains"].as_array().unwrap().iter().map(|d| d["moved"].as_u64().unwrap()).sum();
    anabranch(&split)
        .arg("--force")
        .assert()
        .success()
        .stdout(contains(format!("4 questions stand more than once; {moved} rows moved")));
    assert!(Provenance::verify(&edges).is_ok());
}

#[test]
fn domains_of_few_rows() {
    let row = |n: usize, split: &str, domain: &str, question: &str| {
        format!(
            r#"{{"id": "{n}", "subject": "s", "question": "{question}", "choices": ["1", "2", "3", "4"], "answer": "A", "domains": ["{domain}"], "split": "{split}"}}"#
        )
    };
    let dir = tempfile::tempdir().expect("a folder");
    let (file, out) = (dir.path().join("rows.jsonl"), dir.path().join("edges"));
    let split = ["data", "mmlu", "split", shown(&file), "--out", shown(&out)];
    let rows = [
        row(0, "dev", "none", "a"),
        row(1, "test", "one", "a"),
        row(2, "test", "two", "a"),
        row(3, "validation", "two", "b"),
    ];
    std::fs::write(&file, rows.join("\n")).unwrap();
    let done = anabranch(&split).arg("--json").assert().success();
    for name in
        ["none.train.jsonl", "tasks/none_test.jsonl", "one.train.jsonl", "one.val.jsonl", "two.val.jsonl"]
    {
        assert!(!out.join(name).exists(), "{name}");
        let warned = String::from_utf8_lossy(&done.get_output().stderr).contains(name);
        assert!(warned, "{name}");
    }
    for name in ["tasks/one_test.jsonl", "two.train.jsonl", "tasks/two_test.jsonl"] {
        assert_eq!(lines(&out.join(name)).len(), 1, "{name}");
    }

    let refused = |rows: &[String], more: &[&str], part: &str| {
        std::fs::write(&file, rows.join("\n")).unwrap();
        anabranch(&split).args(more).arg("--force").assert().code(1).stderr(contains(part));
    };
    let same = [row(1, "test", "two", "a"), row(2, "validation", "two", "A ")];
    refused(&same, &[], "two: 2 of 2 rows are one question");
    anabranch(&split).args(["--allow-duplicates", "--force"]).assert().success();
    refused(&[row(1, "dev", "x", "a")], &[], "has no validation and test rows");
    let both = row(1, "test", "x", "a").replace("[\"x\"]", "[\"x\", \"y\"]");
    refused(&[both], &[], "1 is of x and y, expected one domain");
    refused(&[], &[], "has no rows");
    anabranch(&["data", "mmlu", "split", shown(dir.path()), "--out", shown(&out), "--force"])
        .assert()
        .code(1)
        .stderr(contains("mmlu.jsonl"));
}

#[test]
fn bad_files_end_a_command_with_one_line() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("out");
    let bad = |name: &str, bytes: &[u8], parts: &[&str]| {
        let file = dir.path().join(name);
        std::fs::write(&file, bytes).unwrap();
        let mut done =
            anabranch(&["data", "mmlu", "import", shown(&file), "--out", shown(&out)]).assert().code(1);
        for part in parts {
            done = done.stderr(contains(*part));
        }
        assert_eq!(String::from_utf8_lossy(&done.get_output().stderr).lines().count(), 1, "{name}");
        assert!(!out.exists());
    };
    bad("anatomy_test.csv", b"q,1,2,3,A\n", &["anatomy_test.csv: line 1", "has 5 columns, expected 6"]);
    bad("anatomy_val.csv", b"\"open\nquote,1,2,3,4,A\n", &["anatomy_val.csv: line 1"]);
    bad("anatomy_dev.csv", b"q,caf\xe9,2,3,4,A\n", &["byte 0xe9 is not UTF-8", "iconv"]);
    bad("sociology_test.csv", b"q,1,2,3,4,E\n", &["the answer is \"E\""]);
    bad("test.parquet", b"PAR1 no more PAR1", &["test.parquet: is no parquet file"]);
    for name in ["columns", "three", "answer", "zstd"] {
        let bytes = std::fs::read(Path::new(ROOT).join(format!("tests/mmlu/bad/{name}.parquet"))).unwrap();
        bad("test-00000-of-00001.parquet", &bytes, &["test-00000-of-00001.parquet: ", "expected"]);
    }
    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    anabranch(&["data", "mmlu", "import", shown(&empty), "--out", shown(&out)])
        .assert()
        .code(1)
        .stderr(contains("holds no .csv, .parquet or .jsonl file"));
}

#[test]
fn tasks_for_the_harness() {
    let (data, dir) = (csv_folder(), tempfile::tempdir().expect("a folder"));
    cut(data.path(), dir.path(), 0, false);
    let out = dir.path().join("harness");
    let (group, dev) = (dir.path().join("mmlu/mmlu.jsonl"), dir.path().join("mmlu/dev"));
    let one = data.path().join("test/anatomy_test.csv");
    let args = ["data", "export", shown(&group), shown(&one), "--lm-eval", "--out", shown(&out)];
    anabranch(&args).arg("--dry-run").assert().success().stdout(contains("export 112 items as mmlu"));
    anabranch(&args).assert().success().stdout(contains("--tasks mmlu,anatomy_test"));
    let yaml = text(&out.join("mmlu.yaml"));
    let start = r#"group: "mmlu"
task: ["mmlu_anatomy","mmlu_econometrics","mmlu_sociology","mmlu_virology"]
"#;
    assert!(yaml.starts_with(start), "{yaml}");
    for (subject, count) in [("anatomy", 32), ("econometrics", 12), ("sociology", 50), ("virology", 18)] {
        assert_eq!(lines(&out.join(format!("mmlu_{subject}.jsonl"))).len(), count);
        let yaml = text(&out.join(format!("mmlu_{subject}.yaml")));
        assert!(
            yaml.contains(&format!("{{\"data_files\":{{\"test\":\"mmlu_{subject}.jsonl\"}}}}")),
            "{yaml}"
        );
        assert!(yaml.contains(&format!("about {subject}.")) && !yaml.contains("fewshot"), "{yaml}");
    }
    let keys: Vec<String> =
        lines(&out.join("anatomy_test.jsonl"))[0].as_object().unwrap().keys().cloned().collect();
    assert_eq!(keys, ["id", "subject", "question", "choices", "answer"]);
    // Five tasks of two files each, a group, what to do with them, and nothing that is not known.
    assert_eq!(Provenance::verify(&out).unwrap().len(), 12);

    let shots = ["--shots", "2", "--shots-from", shown(&dev), "--force"];
    anabranch(&[&args[..], &shots].concat()).assert().success();
    assert_eq!(lines(&out.join("anatomy_test.shots.jsonl")).len(), 2);
    assert!(text(&out.join("anatomy_test.yaml")).contains("num_fewshot: 2"));
    anabranch(&[&args[..], &["--shots", "2", "--force"]].concat())
        .assert()
        .code(2)
        .stderr(contains("go together"));
    anabranch(&["data", "export", shown(&one), "--out", shown(&out)])
        .assert()
        .code(2)
        .stderr(contains("--lm-eval"));
}

#[test]
fn an_evaluation_leaves_the_harness_s_files() {
    let (data, dir) = (csv_folder(), tempfile::tempdir().expect("a folder"));
    cut(data.path(), dir.path(), 0, false);
    let base = Path::new(ROOT).join("assets/demo/base");
    let (task, out) = (dir.path().join("mmlu/mmlu.jsonl"), dir.path().join("out"));
    let args = ["eval", "--model", shown(&base), "--task", shown(&task), "--out", shown(&out)];
    anabranch(&args).args(["--device", "cpu"]).assert().success();
    let results: Value = serde_json::from_str(&text(&out.join("results.json"))).expect("JSON");
    let report: Value = serde_json::from_str(&text(&out.join("report.json"))).expect("JSON");
    let own = &results["groups"]["mmlu"];
    assert_eq!(own["acc,none"], report["overall"][0]["accuracy"]);
    assert_eq!(own["sample_len"], 112);
    let mut samples = 0;
    for name in results["group_subtasks"]["mmlu"].as_array().unwrap() {
        let rows = lines(&out.join(format!("samples_{}.jsonl", name.as_str().unwrap())));
        let mean = rows.iter().map(|r| r["acc"].as_f64().unwrap()).sum::<f64>() / rows.len() as f64;
        assert!(
            (results["results"][name.as_str().unwrap()]["acc,none"].as_f64().unwrap() - mean).abs() <= 1e-12
        );
        samples += rows.len();
    }
    assert_eq!(samples, 112);
    assert!(Provenance::verify(&out).is_ok());
    anabranch(&args).arg("--resume").assert().success().stdout(contains("already finished"));
}
