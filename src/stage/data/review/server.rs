//! The page that items are reviewed on: a server on this machine, for one person, who has its token.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;

use super::Session;
use super::http::{Reply, Request, Server};
use crate::checkpoint::json;
use crate::data::review::decisions::{Decision, Reason};
use crate::error::{Error, Result};

const PAGE: &str = include_str!("page.html");
const SCRIPT: &str = include_str!("page.js");
const STYLE: &str = include_str!("page.css");

/// How often the end is looked for.
const TICK: Duration = Duration::from_millis(200);

/// Serves the page on 127.0.0.1 until the reviewer or `stop` ends it; `told` is given its address.
pub(super) fn serve(
    session: &mut Session,
    port: u16,
    stop: &AtomicBool,
    told: impl FnOnce(&str),
) -> Result<()> {
    let server = Server::listen(port)
        .map_err(|e| Error::Usage(format!("--port {port}: cannot listen on 127.0.0.1: {e}")))?;
    let port = server.port();
    let mut secret = [0; 20];
    getrandom::fill(&mut secret).map_err(|e| Error::Device(format!("no random numbers for a token: {e}")))?;
    let token = hex::encode(secret);
    told(&format!("http://127.0.0.1:{port}/{token}/"));
    let mut done = false;
    loop {
        if let Some(exchange) = server.next(TICK) {
            let reply = answer(session, &token, &exchange.request, &mut done)?;
            let written = exchange.answer(reply);
            if done {
                written.wait();
            }
        }
        if done || stop.load(Ordering::Relaxed) {
            return Ok(());
        }
    }
}

/// The answer to one request. Who does not know the token learns nothing.
fn answer(session: &mut Session, token: &str, request: &Request, done: &mut bool) -> Result<Reply> {
    if let Err(why) = admitted(request) {
        return Ok(Reply::error(403, why));
    }
    let path = request.target.split(['?', '#']).next().unwrap_or_default();
    let Some((given, route)) = path.trim_start_matches('/').split_once('/') else {
        return Ok(Reply::error(403, "the address lacks its token: use the one that was printed"));
    };
    if !same(given.as_bytes(), token.as_bytes()) {
        return Ok(Reply::error(403, "the address has another token: use the one that was printed"));
    }
    let file = |kind, text: &str| Reply { status: 200, kind, content: text.into() };
    Ok(match (request.method.as_str(), route) {
        ("GET", "") => file("text/html; charset=utf-8", PAGE),
        ("GET", "page.js") => file("text/javascript; charset=utf-8", SCRIPT),
        ("GET", "page.css") => file("text/css; charset=utf-8", STYLE),
        ("GET", "items") => Reply::json(200, &items(session)),
        ("POST", "decisions") => match decision(request) {
            Err(why) => Reply::error(400, &why),
            Ok(decision) => match session.decide(&decision)? {
                Err(why) => Reply::error(409, &why),
                Ok(()) => Reply::json(200, &json!({"decided": session.decided()})),
            },
        },
        ("POST", "finish") => {
            *done = true;
            Reply::json(200, &json!({"decided": session.decided()}))
        }
        ("GET" | "POST", _) => Reply::error(404, "there is nothing here"),
        _ => Reply::error(405, "expected GET or POST"),
    })
}

/// Whether a request may come from this page. A page of another site, or one whose name was bent to 127.0.0.1, may not.
fn admitted(request: &Request) -> Result<(), &'static str> {
    let host = request.header("Host").unwrap_or_default();
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    if !["127.0.0.1", "localhost"].contains(&name) {
        return Err("the Host header is not 127.0.0.1 or localhost");
    }
    if request.header("Origin").is_some_and(|origin| origin.strip_prefix("http://") != Some(host)) {
        return Err("the request comes from another page");
    }
    if request.header("Sec-Fetch-Site").is_some_and(|site| site != "same-origin" && site != "none") {
        return Err("the request comes from another page");
    }
    // A form of another page can send no JSON.
    let json = request
        .header("Content-Type")
        .is_some_and(|t| t.trim().to_ascii_lowercase().starts_with("application/json"));
    if request.method == "POST" && !json {
        return Err("a decision is sent as application/json");
    }
    Ok(())
}

/// Whether two texts are the same, in a time that does not tell where they differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (x, y)| difference | (x ^ y)) == 0
}

fn decision(request: &Request) -> Result<Decision, String> {
    let value = json::parse_line(&request.body).and_then(serde_json::from_value);
    value.map_err(|e| format!("that is no decision: {e}"))
}

/// What the page shows.
fn items(session: &Session) -> serde_json::Value {
    let shown = session.asked.iter().map(|&at| {
        let item = &session.items[at];
        json!({
            "id": item.id,
            "sha256": item.written.sha256(),
            "written": item.written,
            "domains": item.domains,
            "explanation": item.explanation,
            "knowledge": item.knowledge,
            "sources": item.sources,
            "verdict": session.verdict(at),
        })
    });
    let reasons = Reason::ALL.map(|r| json!({"id": r, "label": r.label()}));
    json!({"reviewer": session.reviewer, "reasons": reasons, "items": shown.collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    use super::super::http::MAX_BODY;
    use super::*;
    use crate::data::cross::item::Item;
    use crate::data::review::decisions::tests::items as fixture;
    use crate::data::review::decisions::{Decisions, REVIEWS};

    fn session<'a>(dir: &Path, items: &'a [Item]) -> Session<'a> {
        let decisions = Decisions::open(dir, "ann", items).unwrap();
        Session { items, asked: &[0, 2], reviewer: "ann", decisions }
    }

    /// Sends raw bytes; gives the status and the body.
    fn send(address: &str, request: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(address).unwrap();
        // Less than a request may take to arrive: one that waits for another is an error.
        stream.set_read_timeout(Some(Duration::from_secs(8))).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let status = text.split(' ').nth(1).unwrap().parse().unwrap();
        assert!(text.contains("Content-Security-Policy: default-src 'none'"), "{text}");
        (status, text.split_once("\r\n\r\n").unwrap().1.to_string())
    }

    #[test]
    fn only_the_page_with_the_token_is_answered_and_decisions_are_on_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let (sender, receiver) = channel();
        let served = std::thread::scope(|scope| {
            let folder = dir.path();
            let server = scope.spawn(move || {
                let items = fixture(3);
                let mut session = session(folder, &items);
                let stop = AtomicBool::new(false);
                serve(&mut session, 0, &stop, |url| sender.send(url.to_string()).unwrap()).unwrap();
                session.decided()
            });
            let url = receiver.recv().unwrap();
            let (address, token) =
                url.trim_start_matches("http://").trim_end_matches('/').split_once('/').unwrap();
            assert_eq!(token.len(), 40);
            let port = address.rsplit_once(':').unwrap().1;
            let get = |path: &str, host: &str, more: &str| {
                send(
                    address,
                    &format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{more}\r\n"),
                )
            };
            let post = |route: &str, body: &str, more: &str| {
                let length = body.len();
                send(
                    address,
                    &format!(
                        "POST /{token}/{route} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {length}\r\n{more}\r\n{body}"
                    ),
                )
            };
            let page = format!("/{token}/");
            assert!(get(&page, address, "").1.contains("<script src=\"page.js\""));
            assert_eq!(get(&page, &format!("localhost:{port}"), "Sec-Fetch-Site: none\r\n").0, 200);
            let wrong = format!("/{}/", "0".repeat(40));
            for (path, host, more) in [
                ("/", address, ""),
                ("/items", address, ""),
                (wrong.as_str(), address, ""),
                (&page[..20], address, ""),
                (&page, "evil.example", ""),
                (&page, "", ""),
                (&page, "127.0.0.1.evil.example", ""),
                (&page, address, "Host: evil.example\r\n"),
                (&page, address, "Origin: http://evil.example\r\n"),
                (&page, address, "Origin: null\r\n"),
                (&page, address, "Sec-Fetch-Site: cross-site\r\n"),
            ] {
                let (status, body) = get(path, host, more);
                assert_eq!(status, 403, "{path} {host} {more}");
                assert!(!body.contains(token) && !body.contains("Question"), "{body}");
            }
            assert_eq!(get(&format!("{page}other"), address, "").0, 404);
            let (_, listed) = get(&format!("{page}items"), address, "");
            let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
            let shown = listed["items"].as_array().unwrap();
            assert_eq!(shown.len(), 2);
            assert_eq!((&shown[1]["id"], &shown[1]["verdict"]), (&json!("law-biology/2"), &json!(null)));

            let as_json = "Content-Type: application/json\r\n";
            let reject = json!({"item": shown[1]["id"], "sha256": shown[1]["sha256"], "verdict": "reject", "reason": "wrong-answer"}).to_string();
            assert_eq!(post("decisions", &reject, "Content-Type: text/plain\r\n").0, 403);
            assert_eq!(post("decisions", &reject, "").0, 403);
            assert_eq!(
                post("decisions", &reject, &format!("{as_json}Origin: http://evil.example\r\n")).0,
                403
            );
            let file = dir.path().join(REVIEWS).join("ann.jsonl");
            assert_eq!(std::fs::metadata(&file).unwrap().len(), 0);
            let same_page = format!("{as_json}Origin: http://{address}\r\nSec-Fetch-Site: same-origin\r\n");
            assert_eq!(post("decisions", &reject, &same_page), (200, "{\"decided\":1}".into()));
            assert!(std::fs::read_to_string(&file).unwrap().ends_with("\"reason\":\"wrong-answer\"}\n"));
            for (body, status) in [
                ("{}", 400),
                ("nothing", 400),
                (&reject.replace("wrong-answer", "dull"), 400),
                (&reject.replace("biology/2", "biology/9"), 409),
                (&" ".repeat(MAX_BODY + 10), 413),
            ] {
                assert_eq!(post("decisions", body, as_json).0, status);
            }
            assert_eq!(
                send(
                    address,
                    &format!("PUT {page} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")
                )
                .0,
                405
            );
            assert_eq!(post("finish", "{}", as_json).0, 200);
            server.join().unwrap()
        });
        assert_eq!(served, 1);
    }

    #[test]
    fn nobody_holds_the_page_up() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().to_path_buf();
        let stop = Arc::new(AtomicBool::new(false));
        let (told, address) = channel();
        let (end, ended) = channel();
        let signal = stop.clone();
        // No scope: a test that fails does not wait for a server that hangs.
        std::thread::spawn(move || {
            let items = fixture(3);
            let url = |url: &str| told.send(url.to_string()).unwrap();
            end.send(serve(&mut session(&folder, &items), 0, &signal, url).is_ok()).unwrap();
        });
        let url = address.recv().unwrap();
        let (address, token) =
            url.trim_start_matches("http://").trim_end_matches('/').split_once('/').unwrap();
        let answered = || {
            let page = format!("GET /{token}/ HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
            assert_eq!(send(address, &page).0, 200);
        };
        let post = |route: &str, length: &str| {
            format!(
                "POST {route} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n{length}\r\n\r\n{{\"item"
            )
        };
        let mut held = Vec::new();
        let mut hold = |text: &str| {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
            // The server may have closed it.
            let _ = stream.write_all(text.as_bytes());
            held.push(stream);
        };
        for route in ["/", "/decisions", &format!("/{token}/decisions")] {
            for length in ["1000", "2000", "1048576"] {
                hold(&post(route, &format!("Content-Length: {length}")));
                answered();
            }
            for (length, status) in [
                ("Content-Length: 1048577", 413),
                ("Content-Length: 1000000000000000", 413),
                ("Content-Length: 18446744073709551615", 413),
                ("Content-Length: 99999999999999999999", 413),
                ("Content-Length: -1", 400),
                ("Content-Length: 1\r\nContent-Length: 2", 400),
                ("Transfer-Encoding: chunked", 411),
            ] {
                assert_eq!(send(address, &post(route, length)).0, status, "{route} {length}");
                answered();
            }
        }
        let headers = "a: b\r\n".repeat(100);
        for text in ["", "GET / HT", "\u{16}\u{3}\u{1}", "GET / HTTP/1.1\r\n", &headers, &"x".repeat(100_000)]
        {
            hold(text);
            answered();
        }
        // More answers than anybody takes, and more connections than may be open.
        hold(&format!("GET / HTTP/1.1\r\nHost: {address}\r\n\r\n").repeat(20_000));
        answered();
        (0..100).for_each(|_| hold("GET / HTTP/1.1\r\n"));
        answered();
        stop.store(true, Ordering::Relaxed);
        assert!(ended.recv_timeout(Duration::from_secs(5)).unwrap());
    }

    #[test]
    fn a_signal_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        let stop = AtomicBool::new(false);
        let items = fixture(3);
        serve(&mut session(dir.path(), &items), 0, &stop, |_| stop.store(true, Ordering::Relaxed)).unwrap();
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let err = serve(&mut session(dir.path(), &items), port, &stop, |_| {}).unwrap_err();
        assert!(err.to_string().contains("cannot listen on 127.0.0.1"), "{err}");
    }
}
