//! `data cross` against endpoints that answer, and against some that do everything but: each a real server on this
//! machine. What it writes goes through `data review`.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anabranch::data::cross::client::{Client, Limits};
use anabranch::data::cross::clock::Clock;
use anabranch::data::cross::endpoint::{Endpoint, EndpointOptions};
use anabranch::data::cross::ledger::{Answer, Ledger};
use anabranch::data::cross::prompts::Stage;
use anabranch::data::tasks;
use anabranch::error::{Error, Result};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection};
use serde_json::{Value, json};
use tempfile::TempDir;

#[path = "common/endpoint.rs"]
mod endpoint;
use endpoint::{Act, Request, Stub, completion, model, response};

const KEY: &str = "sk-test-0123456789abcdefghij";

/// A clock on which waiting takes no time.
#[derive(Default)]
struct Fake(AtomicU64);

impl Clock for Fake {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }

    fn sleep(&self, time: Duration) {
        self.0.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }
}

fn options(url: &str) -> EndpointOptions {
    EndpointOptions {
        base_url: url.into(),
        model: "m".into(),
        ca: None,
        key_env: "ANABRANCH_TEST_NO_KEY".into(),
        temperature: None,
        answer_tokens: None,
        timeout: Duration::from_millis(500),
        connections: 1,
    }
}

/// One client with a ledger of its own and a clock that does not wait.
struct Asker {
    dir: TempDir,
    endpoint: Endpoint,
    limits: Limits,
    clock: Fake,
    stop: AtomicBool,
}

impl Asker {
    fn new(url: &str) -> Asker {
        Asker {
            dir: tempfile::tempdir().unwrap(),
            endpoint: Endpoint::new(&options(url)).unwrap(),
            limits: Limits { requests: None, tokens: None, patience: Duration::from_secs(1800) },
            clock: Fake::default(),
            stop: AtomicBool::new(false),
        }
    }

    fn client(&self) -> Client<'_> {
        let ledger = Ledger::open(&self.dir.path().join("ledger.jsonl")).unwrap();
        Client::new(&self.endpoint, ledger, self.limits, &self.clock, &self.stop)
    }

    fn ask(&self, what: &str) -> Result<Answer> {
        self.client().ask(Stage::Knowledge, &[what.to_string()]).map(|r| r.answer)
    }

    fn refused(&self) -> String {
        self.ask("hello").unwrap_err().to_string()
    }

    fn seconds(&self) -> u64 {
        self.clock.now().as_secs()
    }
}

fn said(answer: &Answer) -> &str {
    match answer {
        Answer::Said { content, .. } => content,
        Answer::Refused(why) => panic!("refused: {why}"),
    }
}

#[test]
fn what_ends_a_run_at_once_is_said_once_and_clearly() {
    for (act, expected) in [
        (
            (401, "", "{\"error\": {\"message\": \"Incorrect API key\"}}"),
            "wants a key, and $ANABRANCH_TEST_NO_KEY is not set (401): Incorrect API key",
        ),
        ((403, "", "go away"), "(403): go away"),
        (
            (402, "", "{\"error\": {\"message\": \"Insufficient Balance\"}}"),
            "wants to be paid (402): Insufficient Balance",
        ),
        ((404, "", "{\"error\": \"no such model\"}"), "no model \"m\" (404): no such model"),
        (
            (400, "", "{\"error\": {\"message\": \"temperature is wrong\", \"code\": 7}}"),
            "refuses the request (400): temperature is wrong",
        ),
        (
            (200, "Content-Type: text/html\r\n", "<p>Welcome"),
            "answers with a web page (<p>Welcome): the URL should be that of the API",
        ),
        ((200, "", " <!DOCTYPE html><html></html>"), "answers with a web page"),
        (
            (307, "Location: http://elsewhere.example/v1\r\n", ""),
            "redirects to http://elsewhere.example/v1, which is not followed",
        ),
        ((302, "", ""), "redirects to nowhere"),
    ] {
        let (status, headers, body) = act;
        let stub = Stub::new(move |_| Act::Send(response(status, headers, body)));
        let asker = Asker::new(&stub.url);
        let why = asker.refused();
        assert!(why.contains(expected) && why.contains(&stub.url), "{why}");
        assert_eq!((stub.count(), asker.seconds()), (1, 0), "{why}");
    }
}

/// A server with a certificate that no authority vouches for which browsers trust: its URL.
fn private() -> String {
    let file = pem("server.pem");
    let certificate = CertificateDer::from_pem_file(&file).unwrap();
    let key = PrivateKeyDer::from_pem_file(&file).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}/v1", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for tcp in listener.incoming() {
            let mut stream =
                rustls::StreamOwned::new(ServerConnection::new(Arc::clone(&config)).unwrap(), tcp.unwrap());
            let (mut request, mut part) = (Vec::new(), [0; 4096]);
            // Who does not trust the server hangs up before there is a request.
            while !request.ends_with(b"false}") {
                match stream.read(&mut part) {
                    Ok(read @ 1..) => request.extend(&part[..read]),
                    _ => break,
                }
            }
            let body = json!({"choices": [{"message": {"content": "hello"}}]}).to_string();
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            let _ = stream.write_all((head + &body).as_bytes()).and_then(|()| stream.flush());
        }
    });
    url
}

fn pem(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tls").join(name)
}

#[test]
fn a_private_authority_vouches_where_it_is_named() {
    let url = private();
    let asker = |ca: Option<PathBuf>| {
        let options = EndpointOptions { ca, timeout: Duration::from_secs(60), ..options(&url) };
        Asker { endpoint: Endpoint::new(&options).unwrap(), ..Asker::new(&url) }
    };
    assert_eq!(said(&asker(Some(pem("authority.pem"))).ask("hello").unwrap()), "hello");
    // The server's own certificate makes nobody an authority.
    for ca in [None, Some(pem("server.pem"))] {
        let stranger = asker(ca);
        let why = stranger.refused();
        assert!(why.contains("cannot be reached safely"), "{why}");
        assert!(why.contains("give a private authority's certificate as --ca"), "{why}");
        assert_eq!(stranger.seconds(), 0, "waiting does not help");
    }
}

#[test]
fn what_is_no_answer_is_tried_again_and_then_told() {
    for (bytes, expected) in [
        (response(200, "", "no JSON\u{7}at all"), "answers with no chat completion: 14 bytes are no JSON"),
        (response(200, "", "{\"choices\": []}"), "it has no choices[0].message: {\"choices\": []}"),
        (response(200, "", "[]"), "it has no choices[0].message"),
        (response(200, "", "{\"choices\": [{\"message\": {\"content\": 3}}]}"), "the message's content is 3"),
        (response(200, "", "{\"error\": {\"message\": \"upstream is ill\"}}"), "upstream is ill"),
        (response(200, "", "data: {\"choices\": [{\"delta\": {\"content\": \"x\"}}]}\n\n"), "are no JSON"),
        (response(200, "", ""), "0 bytes are no JSON"),
        (b"\x00\xff\xfe this is no HTTP at all\r\n\r\n\r\n".to_vec(), "sends no HTTP"),
    ] {
        let stub = Stub::new(move |_| Act::Cut(bytes.clone()));
        let asker = Asker::new(&stub.url);
        let why = asker.refused();
        assert!(why.contains(expected) && why.ends_with("; 4 times"), "{expected}: {why}");
        assert!(!why.chars().any(char::is_control), "{why}");
        assert_eq!(stub.count(), 4);
    }
    let stub =
        Stub::new(|r| if r.number < 3 { Act::Send(response(200, "", "?")) } else { completion("at last") });
    assert_eq!(said(&Asker::new(&stub.url).ask("x").unwrap()), "at last");
}

#[test]
fn a_busy_endpoint_is_waited_for_as_long_as_it_says() {
    for (headers, least) in [("Retry-After: 60\r\n", 300), ("", 5)] {
        let stub = Stub::new(move |r| match r.number {
            0..5 => Act::Send(response(429, headers, "{\"error\": {\"message\": \"slow down\"}}")),
            _ => completion("now"),
        });
        let asker = Asker::new(&stub.url);
        assert_eq!(said(&asker.ask("x").unwrap()), "now");
        assert!((least..least + 60).contains(&asker.seconds()), "{headers}: {} s", asker.seconds());
        let client = asker.client();
        assert_eq!(client.spent(), (6, 100));
    }
    let stub = Stub::new(|_| Act::Send(response(429, "", "")));
    let asker = Asker::new(&stub.url);
    let why = asker.refused();
    assert!(why.contains("has too many requests (429); given up after"), "{why}");
    assert!(
        (1700..=1800).contains(&asker.seconds()) && stub.count() > 20,
        "{} s, {}",
        asker.seconds(),
        stub.count()
    );
    let stub = Stub::new(|_| Act::Send(response(429, "Retry-After: 86400\r\n", "")));
    let asker = Asker::new(&stub.url);
    assert!(
        asker
            .refused()
            .contains("asks to wait 86400 s; given up after 1 try in 0 s, as --patience 1800 says")
    );
    for status in [500, 502, 503, 529] {
        let stub = Stub::new(move |r| match r.number {
            0 => Act::Send(response(status, "Content-Type: text/html\r\n", "<html>Bad Gateway")),
            _ => completion("now"),
        });
        assert_eq!(said(&Asker::new(&stub.url).ask("x").unwrap()), "now", "{status}");
    }
}

#[test]
fn half_an_answer_none_and_too_much_of_one() {
    let whole = response(200, "", "{\"choices\": [{\"message\": {\"content\": \"all of it\"}}]}");
    let half = whole[..whole.len() - 9].to_vec();
    let stub =
        Stub::new(move |r| if r.number == 0 { Act::Cut(half.clone()) } else { Act::Send(whole.clone()) });
    assert_eq!(said(&Asker::new(&stub.url).ask("x").unwrap()), "all of it");
    assert_eq!(stub.count(), 2);

    let stub = Stub::new(|_| Act::Hang);
    let mut asker = Asker::new(&stub.url);
    asker.limits.patience = Duration::ZERO;
    let why = asker.refused();
    assert!(why.contains("did not answer in the time that --timeout gives; given up after 1 try"), "{why}");
    // The beginning of an answer that never ends is none either.
    let stub = Stub::new(|_| Act::Flood(b"HTTP/1.1 200 OK\r\nX: ".to_vec(), b"x".repeat(1 << 16)));
    let asker = Asker::new(&stub.url);
    assert!(asker.refused().contains("the endpoint"));

    let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
    let chunk = [b"10000\r\n".to_vec(), b"x".repeat(1 << 16), b"\r\n".to_vec()].concat();
    let stub = Stub::new(move |_| Act::Flood(head.clone(), chunk.clone()));
    let asker = Asker {
        endpoint: Endpoint::new(&EndpointOptions { timeout: Duration::from_secs(60), ..options(&stub.url) })
            .unwrap(),
        ..Asker::new(&stub.url)
    };
    let answer = asker.ask("x").unwrap();
    assert_eq!(answer, Answer::Refused("its answer has more than 16777216 bytes".into()));
}

#[test]
fn a_prompt_that_is_too_long_is_asked_once_and_for_all() {
    for (status, body) in [
        (
            400,
            json!({"error": {"message": "This model's maximum context length is 4096 tokens", "code": "context_length_exceeded"}}),
        ),
        (
            400,
            json!({"object": "error", "message": "The prompt (9000 tokens) is longer than the context window", "type": "BadRequestError"}),
        ),
        (413, json!({"detail": "too large"})),
        (422, json!({"error": {"message": "filtered", "code": "content_filter"}})),
    ] {
        let text = body.to_string();
        let stub = Stub::new(move |r| match r.messages()[0].as_str() {
            "long" => Act::Send(response(status, "", &text)),
            _ => completion("short"),
        });
        let asker = Asker::new(&stub.url);
        for _ in 0..2 {
            let Answer::Refused(why) = asker.ask("long").unwrap() else { panic!("answered") };
            assert!(why.starts_with(&format!("refuses ({status}): ")), "{why}");
        }
        assert_eq!(said(&asker.ask("other").unwrap()), "short");
        assert_eq!(stub.count(), 2);
    }
}

#[test]
fn an_endpoint_that_is_not_there_is_told_at_once_and_one_that_goes_is_waited_for() {
    let stub = Stub::new(|_| completion("x"));
    let (asker, url) = (Asker::new(&stub.url), stub.url.clone());
    drop(stub);
    // The thread that listened ends with the stub.
    let mut why = asker.refused();
    for _ in 0..100 {
        if why.contains("refuses connections") {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
        why = asker.refused();
    }
    assert_eq!(why, format!("the endpoint {url}/chat/completions refuses connections: is it running there?"));

    let stub = Stub::new(|_| {
        Act::Cut(match completion("x") {
            Act::Send(bytes) => bytes,
            _ => unreachable!(),
        })
    });
    let asker = Asker::new(&stub.url);
    let client = asker.client();
    client.ask(Stage::Alone, &["a".into()]).unwrap();
    drop(stub);
    let err = loop {
        // Until the listening thread is gone an answer may still come.
        if let Err(e) = client.ask(Stage::Alone, &[asker.seconds().to_string()]) {
            break e.to_string();
        }
    };
    assert!(err.contains("given up after") && asker.seconds() > 1700, "{err}");
}

#[test]
fn budgets_and_signals_end_a_run_and_what_was_answered_is_kept() {
    let stub = Stub::new(|r| completion(&r.messages()[0]));
    let mut asker = Asker::new(&stub.url);
    asker.limits.requests = Some(2);
    let client = asker.client();
    for text in ["a", "b", "a", "b"] {
        assert_eq!(said(&client.ask(Stage::Alone, &[text.into()]).unwrap().answer), text);
    }
    let err = client.ask(Stage::Alone, &["c".into()]).unwrap_err().to_string();
    assert!(err.starts_with("--max-requests 2 is used up (2 requests)"), "{err}");
    drop(client);
    assert!(asker.refused().contains("--max-requests 2 is used up"));
    asker.limits = Limits { requests: None, tokens: Some(250), ..asker.limits };
    assert_eq!(said(&asker.ask("c").unwrap()), "c");
    assert!(asker.refused().starts_with("--max-tokens 250 is used up (300 tokens)"));
    assert_eq!(stub.count(), 3);
    asker.limits.tokens = None;
    asker.stop.store(true, Ordering::Relaxed);
    assert!(matches!(asker.ask("d").unwrap_err(), Error::Interrupted(_)));
    // What is in the ledger needs nobody.
    assert_eq!(said(&asker.client().ask(Stage::Alone, &["a".into()]).unwrap().answer), "a");
}

/// `count` questions of a domain, as `data mmlu split` writes them.
fn domain(dir: &Path, name: &str, count: usize) -> PathBuf {
    let line = |n: usize| {
        let choices = [0, 1, 2, 3].map(|c| format!("{name} option {c} of {n}"));
        json!({"id": format!("{name}-{n}"), "question": format!("What of {name} is number {n}?"), "choices": choices, "answer": n % 4, "subject": format!("{name}_basics"), "domains": [name]}).to_string() + "\n"
    };
    let path = dir.join(format!("{name}.test.jsonl"));
    std::fs::write(&path, (0..count).map(line).collect::<String>()).unwrap();
    path
}

fn anabranch(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_anabranch"));
    command.current_dir(dir).env("CROSS_KEY", KEY).args(args);
    for proxy in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        command.env_remove(proxy);
    }
    command
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The files of a folder, by name.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

#[test]
fn killed_five_times_it_gives_the_set_of_an_undisturbed_run() {
    const WORKERS: usize = 12;
    let dir = tempfile::tempdir().unwrap();
    for name in ["hum", "sc", "stem"] {
        domain(dir.path(), name, 60);
    }
    let stub = Stub::new(|r| completion(&model(r)));
    let arguments = |out: &str, workers: usize| {
        let typed = format!(
            "data cross --source hum.test.jsonl sc.test.jsonl stem.test.jsonl --allow-leak --base-url {} --model stub --items 500 --seed 5 --concurrency {workers} --resume --out {out}",
            stub.url
        );
        typed.split(' ').map(String::from).collect::<Vec<_>>()
    };
    let command = |out: &str, workers: usize| {
        let typed = arguments(out, workers);
        anabranch(dir.path(), &typed.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let done = command("once", 3).output().unwrap();
    assert!(done.status.success(), "{}", text(&done));
    let (once, requests) = (files(&dir.path().join("once")), stub.count());
    assert_eq!(stub.repeated(), 0);
    stub.forget();
    for round in 1..=5 {
        let mut child =
            command("killed", WORKERS).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        while stub.count() < round * requests / 6 {
            assert!(child.try_wait().unwrap().is_none(), "it ended by itself in round {round}");
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!dir.path().join("killed").exists());
    }
    let done = command("killed", WORKERS).output().unwrap();
    assert!(done.status.success(), "{}", text(&done));
    let killed = files(&dir.path().join("killed"));
    assert_eq!(
        once.keys().collect::<Vec<_>>(),
        [
            "anabranch.json",
            "hum-sc.jsonl",
            "hum-stem.jsonl",
            "items.jsonl",
            "rejected.jsonl",
            "sc-stem.jsonl",
            "summary.json"
        ]
    );
    assert!(once == killed, "the sets differ");
    assert!(stub.repeated() <= 5 * WORKERS, "{} requests were paid twice", stub.repeated());
    assert_eq!(stub.count() - stub.repeated(), requests);

    for pair in ["hum-sc", "hum-stem", "sc-stem"] {
        let task = tasks::load(&dir.path().join("once").join(format!("{pair}.jsonl"))).unwrap();
        let mut places = [0; 4];
        task.items.iter().for_each(|i| places[i.gold] += 1);
        assert_eq!(places, [125; 4]);
        assert_eq!(task.items[0].domains.join("-"), pair);
        // The right option kept its text through the shuffle.
        for item in &task.items {
            let tasks::Form::Question { question, choices } = &item.form else { panic!("a question") };
            let name = question.trim_start_matches("What is ").trim_end_matches('?');
            assert_eq!(choices[item.gold], format!("right of {name}"));
        }
    }
    let summary: Value = serde_json::from_slice(&once["summary.json"]).unwrap();
    let counts = &summary["pairs"][0];
    let count = |name: &str| counts[name].as_u64().unwrap();
    assert!(count("unmergeable") > 50 && count("malformed") > 5, "{counts}");
    assert_eq!(count("candidates"), 500 + count("unmergeable") + count("malformed"));
    let first = String::from_utf8_lossy(&once["items.jsonl"]).lines().next().unwrap().to_string();
    let first: Value = serde_json::from_str(&first).unwrap();
    assert_eq!((&first["model"], &first["sources"][1]["domain"]), (&json!("stub"), &json!("sc")));
    let stages: Vec<&str> =
        first["calls"].as_array().unwrap().iter().map(|c| c["stage"].as_str().unwrap()).collect();
    assert!(stages.starts_with(&["mergeability"]) && stages.ends_with(&["question"]), "{stages:?}");
    let again = command("killed", 1).output().unwrap();
    assert!(
        text(&again).contains("already finished") && text(&again).contains("125/125/125/125"),
        "{}",
        text(&again)
    );
}

/// All the bytes of the files under `dir`.
fn bytes(dir: &Path) -> Vec<u8> {
    let paths = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    paths.flat_map(|p| if p.is_dir() { bytes(&p) } else { std::fs::read(&p).unwrap() }).collect()
}

#[test]
fn the_key_goes_to_the_endpoint_and_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    domain(dir.path(), "a", 3);
    domain(dir.path(), "b", 3);
    let elsewhere = Stub::new(|_| completion("got it"));
    let to = elsewhere.url.clone();
    // It repeats the key wherever it can.
    let loud = |r: &Request| {
        assert_eq!(
            (r.authorization.as_deref(), r.path.as_str()),
            (Some(format!("Bearer {KEY}").as_str()), "/v1/chat/completions")
        );
    };
    let talks = move |r: &Request| {
        loud(r);
        completion(&model(r).replace("Both.", KEY).replace("one thing", KEY).replace("They meet", KEY))
    };
    let run = |url: &str, out: &str| {
        let args = format!(
            "-vv data cross --source a.test.jsonl b.test.jsonl --allow-leak --base-url {url} --model m --key-env CROSS_KEY --items 4 --out {out}"
        );
        anabranch(dir.path(), &args.split(' ').collect::<Vec<_>>()).env("RUST_LOG", "trace").output().unwrap()
    };
    let stub = Stub::new(talks);
    let done = run(&stub.url, "out");
    assert!(done.status.success(), "{}", text(&done));
    let all = [bytes(dir.path()), text(&done).into_bytes()].concat();
    let holds = |what: &str| all.windows(what.len()).any(|w| w == what.as_bytes());
    assert!(holds("that [key] holds") && !holds(KEY) && !holds(&KEY[5..20]));

    for (act, expected) in [
        (
            response(401, "", &format!("{{\"error\": {{\"message\": \"bad key {KEY}\"}}}}")),
            "does not take the key in $CROSS_KEY (401): bad key [key]",
        ),
        (response(307, &format!("Location: {to}/{KEY}\r\n"), ""), "redirects to "),
        (response(308, &format!("Location: {to}\r\n"), ""), "redirects to "),
        (response(302, &format!("Location: {to}\r\n"), ""), "redirects to "),
    ] {
        let stub = Stub::new(move |_| Act::Send(act.clone()));
        let failed = run(&stub.url, "failed");
        assert_eq!(failed.status.code(), Some(1));
        assert!(text(&failed).contains(expected), "{}", text(&failed));
        assert!(!text(&failed).contains(&KEY[5..20]), "{}", text(&failed));
    }
    assert_eq!(elsewhere.count(), 0);
    let secret = run(&format!("http://user:{KEY}@127.0.0.1/v1"), "failed");
    assert_eq!(secret.status.code(), Some(2));
    assert!(!text(&secret).contains(&KEY[5..20]), "{}", text(&secret));
}

#[test]
fn sources_that_edges_are_trained_on_are_left_out_and_told() {
    let dir = tempfile::tempdir().unwrap();
    domain(dir.path(), "a", 6);
    domain(dir.path(), "b", 5);
    let lines = std::fs::read_to_string(dir.path().join("a.test.jsonl")).unwrap();
    std::fs::write(
        dir.path().join("train.jsonl"),
        lines.lines().skip(2).take(3).map(|l| format!("{l}\n")).collect::<String>(),
    )
    .unwrap();
    let stub = Stub::new(|r| completion(&model(r)));
    let run = |more: &str| {
        let args = format!(
            "data cross --source a.test.jsonl b.test.jsonl --base-url {} --model m --items 9 {more}",
            stub.url
        );
        let output = anabranch(dir.path(), &args.split(' ').collect::<Vec<_>>()).output().unwrap();
        (output.status.code().unwrap(), text(&output))
    };
    let (code, said) = run("--out out");
    assert!(code == 2 && said.contains("without --train nothing tells"), "{said}");
    let (code, said) = run("--train train.jsonl --out out --dry-run");
    assert!(
        code == 0
            && said.contains(
                "3 sources stand in the training data and are left out: a.test:a-2, a.test:a-3, a.test:a-4"
            ),
        "{said}"
    );
    assert!(said.contains("write 9 items of a and b from 3 x 5 questions: at least 27 requests"), "{said}");
    assert_eq!(stub.count(), 0);
    let (code, said) = run("--train train.jsonl --out out --single-domain-check");
    assert!(code == 0 && said.contains("3 sources stand in the training data"), "{said}");
    let items = std::fs::read_to_string(dir.path().join("out/items.jsonl")).unwrap();
    for line in items.lines() {
        let item: Value = serde_json::from_str(line).unwrap();
        assert!(["a-0", "a-1", "a-5"].contains(&item["sources"][0]["id"].as_str().unwrap()), "{item}");
        assert_eq!(item["calls"].as_array().unwrap().iter().filter(|c| c["stage"] == "alone").count(), 2);
    }
    let (code, said) = run("--train train.jsonl --allow-leak --out leaky --candidates 2");
    assert!(code == 0 && said.contains("used all the same, as --allow-leak says"), "{said}");
    assert!(said.contains("items of 9: all of its 2 candidates were tried"), "{said}");
    let (code, said) = run("--train a.test.jsonl --out none");
    assert!(code == 2 && said.contains("every source of a stands in the training data"), "{said}");
    let (code, said) = run("--allow-leak --out none --pair a,c");
    assert!(code == 2 && said.contains("no source is of the domain \"c\""), "{said}");
    let (code, said) = run("--allow-leak --out none --temperature 3");
    assert!(code == 2 && said.contains("--temperature is 3"), "{said}");
}

#[test]
fn what_is_written_is_reviewed_and_what_is_accepted_is_a_task() {
    let dir = tempfile::tempdir().unwrap();
    domain(dir.path(), "a", 8);
    domain(dir.path(), "b", 8);
    let stub = Stub::new(|r| completion(&model(r)));
    let args = format!(
        "data cross --source a.test.jsonl b.test.jsonl --allow-leak --base-url {} --model m --items 12 --out cross",
        stub.url
    );
    let done = anabranch(dir.path(), &args.split(' ').collect::<Vec<_>>()).output().unwrap();
    assert!(done.status.success(), "{}", text(&done));
    let review = |more: &str, typed: &str| {
        let args = format!("data review cross {more}");
        std::fs::write(dir.path().join("typed"), typed).unwrap();
        let input = std::fs::File::open(dir.path().join("typed")).unwrap();
        let output =
            anabranch(dir.path(), &args.split(' ').collect::<Vec<_>>()).stdin(input).output().unwrap();
        (output.status.code().unwrap(), text(&output))
    };
    let (code, said) = review("--reviewer ann --terminal", "a\na\n1\na\nq\n");
    assert!(
        code == 0
            && said.contains("4 of 12 items decided by ann, 3 accepted, 0 edited, 1 rejected (1 incoherent)"),
        "{said}"
    );
    let (code, said) = review("--reviewer bob --terminal", "a\n2\n2\ne\nBetter?\n\n\n\n\n\nq\n");
    assert!(code == 0 && said.contains("ann and bob: 3 of 4 agreed, Cohen's kappa 0.500"), "{said}");
    let (code, said) = review("--reviewer bob --summary --accepted task.jsonl", "");
    assert!(
        code == 0 && said.contains("task.jsonl: 2 items (1 rejected, 1 disputed, 8 undecided)"),
        "{said}"
    );
    let task = tasks::load(&dir.path().join("task.jsonl")).unwrap();
    let tasks::Form::Question { question, .. } = &task.items[1].form else { panic!("a question") };
    assert_eq!((task.items.len(), question.as_str()), (2, "Better?"));
    let (code, said) = review("--summary --accepted task.jsonl --keep-undecided", "");
    assert!(code == 2 && said.contains("task.jsonl exists: --force replaces it"), "{said}");
    let (code, said) = review("--summary --accepted task.jsonl --keep-undecided --force", "");
    assert!(code == 0 && said.contains("task.jsonl: 10 items"), "{said}");
    std::fs::write(dir.path().join("notes"), "mine").unwrap();
    let (code, said) = review("--summary --accepted notes --force", "");
    assert!(code == 2 && said.contains("was not made by this program"), "{said}");
    // A sample is the same for everybody, and people's work is never replaced.
    let (_, said) = review("--reviewer eve --terminal --sample 5", "a\na\na\na\na\n");
    assert!(said.contains("5 of 5 items decided by eve"), "{said}");
    for (more, expected) in [
        ("--sample 13 --summary", "--sample is 13, expected 1 to 12"),
        ("--reviewer ../x --summary", "--reviewer is \"../x\""),
    ] {
        let (code, said) = review(more, "");
        assert!(code == 2 && said.contains(expected), "{said}");
    }
    let forced = anabranch(dir.path(), &[&args.split(' ').collect::<Vec<_>>()[..], &["--force"]].concat())
        .output()
        .unwrap();
    assert!(forced.status.code() == Some(2) && text(&forced).contains("reviews/"), "{}", text(&forced));
    let nothing = anabranch(dir.path(), &["data", "review", "."]).output().unwrap();
    assert!(text(&nothing).contains("has no items.jsonl"), "{}", text(&nothing));
}
