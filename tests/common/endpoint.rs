//! A chat endpoint on this machine that does what a test tells it, well or badly.

#![allow(dead_code, reason = "each test uses a part")]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anabranch::checkpoint::digest::sha256;
use serde_json::{Value, json};

/// What came.
pub struct Request {
    /// `/v1/chat/completions`.
    pub path: String,
    /// `Authorization`, as it came.
    pub authorization: Option<String>,
    /// The body.
    pub body: Value,
    /// SHA-256 of the body's bytes.
    pub hash: String,
    /// How many requests came before this one.
    pub number: usize,
}

impl Request {
    /// The texts of the messages.
    pub fn messages(&self) -> Vec<String> {
        let list = self.body["messages"].as_array().expect("messages");
        list.iter().map(|m| m["content"].as_str().expect("content").to_string()).collect()
    }
}

/// What to do about it.
pub enum Act {
    /// These bytes, and the connection stays.
    Send(Vec<u8>),
    /// These bytes, and the connection ends.
    Cut(Vec<u8>),
    /// These bytes again and again until nobody listens.
    Flood(Vec<u8>, Vec<u8>),
    /// Nothing, for as long as the test runs.
    Hang,
}

/// The endpoint, until it is dropped.
pub struct Stub {
    /// `http://127.0.0.1:PORT/v1`.
    pub url: String,
    count: Arc<AtomicUsize>,
    hits: Arc<Mutex<HashMap<String, usize>>>,
    over: Arc<AtomicBool>,
}

impl Stub {
    /// Serves `act`, a thread a connection.
    pub fn new(act: impl Fn(&Request) -> Act + Send + Sync + 'static) -> Stub {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let stub = Stub {
            url: format!("http://{address}/v1"),
            count: Arc::default(),
            hits: Arc::default(),
            over: Arc::default(),
        };
        let (count, hits, over) = (stub.count.clone(), stub.hits.clone(), stub.over.clone());
        let act = Arc::new(act);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let (count, hits, over, act) = (count.clone(), hits.clone(), over.clone(), act.clone());
                std::thread::spawn(move || {
                    // A client that was killed is gone: that is no failure here.
                    let _ = converse(stream, &count, &hits, &over, &*act);
                });
            }
        });
        stub
    }

    /// How many requests came.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// How many requests came that had come before.
    pub fn repeated(&self) -> usize {
        self.hits.lock().expect("a lock").values().map(|n| n - 1).sum()
    }

    /// Forgets all that came.
    pub fn forget(&self) {
        self.count.store(0, Ordering::Relaxed);
        self.hits.lock().expect("a lock").clear();
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // Wakes the thread that waits for a connection.
        let address = self.url.trim_start_matches("http://").trim_end_matches("/v1");
        let _ = TcpStream::connect(address);
    }
}

fn converse(
    stream: TcpStream,
    count: &AtomicUsize,
    hits: &Mutex<HashMap<String, usize>>,
    over: &AtomicBool,
    act: &dyn Fn(&Request) -> Act,
) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let path = line.split(' ').nth(1).unwrap_or_default().to_string();
        let (mut length, mut authorization) = (0, None);
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            let Some((name, value)) = header.trim_end().split_once(':') else { break };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.trim().parse().expect("a length"),
                "authorization" => authorization = Some(value.trim().to_string()),
                _ => {}
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let hash = sha256(&body);
        let number = count.fetch_add(1, Ordering::Relaxed);
        *hits.lock().expect("a lock").entry(hash.clone()).or_default() += 1;
        let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
        match act(&Request { path, authorization, body, hash, number }) {
            Act::Send(bytes) => stream.write_all(&bytes)?,
            Act::Cut(bytes) => return stream.write_all(&bytes),
            Act::Flood(first, again) => {
                stream.write_all(&first)?;
                while !over.load(Ordering::Relaxed) {
                    stream.write_all(&again)?;
                }
                return Ok(());
            }
            Act::Hang => {
                while !over.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(10));
                }
                return Ok(());
            }
        }
    }
}

/// A whole response.
pub fn response(status: u16, headers: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status} Whatever\r\nContent-Length: {}\r\n{headers}\r\n{body}", body.len())
        .into_bytes()
}

/// A chat completion that says `content`.
pub fn completion(content: &str) -> Act {
    let body = json!({
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
    });
    Act::Send(response(200, "Content-Type: application/json\r\n", &body.to_string()))
}

/// What a model with some faults answers: which, is decided by the hash of what it is asked.
pub fn model(request: &Request) -> String {
    let messages = request.messages();
    let first = messages.len() == 1;
    let draw = |n: u64, of: &str| {
        u64::from_str_radix(&sha256((messages[0].clone() + of).as_bytes())[..8], 16).expect("hexadecimal") % n
    };
    let asks = |form: &str| messages[0].contains(form);
    if asks("{\"mergeable\":") {
        let says = match (draw(5, "merge"), draw(9, "fault")) {
            (0, _) => "{\"mergeable\": \"No\", \"reason\": \"Nothing joins them.\"}",
            (_, 0) if first => "Certainly they can be merged!",
            _ => "{\"mergeable\": \"Yes\", \"reason\": \"They meet.\"}",
        };
        return format!("<think>Let me see {{\"mergeable\": \"No\"}} …</think>\n```json\n{says}\n```");
    }
    if asks("{\"first\":") {
        return "{\"first\": \"that one thing holds\", \"second\": \"that another does\"}".into();
    }
    if asks("{\"question\":") {
        let right = draw(4, "right") as usize;
        let name = &sha256(messages[0].as_bytes())[..12];
        let options: Vec<String> = (0..4)
            .map(|n| if n == right { format!("right of {name}") } else { format!("wrong {n} of {name}") })
            .collect();
        let options = match draw(6, "options") {
            // Some are put right when the model is told, some never.
            0 if first || draw(4, "stubborn") == 0 => options[..3].to_vec(),
            _ => options,
        };
        let letter = ["A", "B", "C", "D"][right];
        return json!({"question": format!("What is {name}?"), "options": options, "answer": letter, "explanation": "Both."})
            .to_string();
    }
    assert!(asks("or \"none\","), "{}", messages[0]);
    let says = if draw(10, "alone") == 0 {
        let line = messages[0].lines().find(|l| l.contains(". right of")).expect("the right option");
        line[..1].to_string()
    } else {
        "none".into()
    };
    json!({"answer": says, "reason": "It is so."}).to_string()
}
