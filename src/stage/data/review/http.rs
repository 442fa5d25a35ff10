//! Requests to this machine, of which none can hold up the others.
//!
//! Anybody on the machine may connect, and send half a request, one without end, or none. So each connection is read
//! and written on a thread of its own, in memory and time with a bound; the owner of the [`Server`] sees whole requests
//! only. Where too many connections are open, the oldest is closed.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// The most bytes of a body.
pub(super) const MAX_BODY: usize = 1 << 20;
/// The most bytes before the body.
const MAX_HEAD: usize = 1 << 14;
/// The most headers.
const MAX_HEADERS: usize = 64;
/// The most connections at a time; a page needs six.
const MAX_OPEN: usize = 32;
/// How long a request may take to arrive, and a response to be taken.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the rest of a refused request is read, so that the sender gets to see why.
const LINGER: Duration = Duration::from_secs(2);
/// How long to wait where no connection can be taken.
const PAUSE: Duration = Duration::from_millis(100);
/// Nothing is loaded from elsewhere, nothing frames the page, and its address, which holds the token, goes nowhere.
const HEADERS: [(&str, &str); 8] = [
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
    ("Connection", "close"),
];

/// A request that has arrived to its end.
#[derive(Debug)]
pub(super) struct Request {
    /// `GET`, `POST`, …
    pub method: String,
    /// The path, with what follows it.
    pub target: String,
    pub body: Vec<u8>,
    headers: Vec<(String, String)>,
}

impl Request {
    /// The header `name`. Two of one are as good as a wrong one: an empty text.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut found = self.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
        let (_, value) = found.next()?;
        Some(if found.next().is_some() { "" } else { value })
    }

    /// The head of a request at the beginning of `bytes` and its length; none if it is not all there.
    fn head(bytes: &[u8]) -> Result<Option<(Request, usize)>, Reply> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut head = httparse::Request::new(&mut headers);
        let wrong = |why: &str| Reply::error(400, &format!("that is no request: {why}"));
        let length = match head.parse(bytes).map_err(|e| wrong(&e.to_string()))? {
            httparse::Status::Partial if bytes.len() > MAX_HEAD => {
                return Err(Reply::error(431, &format!("a request's head has at most {MAX_HEAD} bytes")));
            }
            httparse::Status::Partial => return Ok(None),
            httparse::Status::Complete(length) => length,
        };
        let header = |h: &httparse::Header<'_>| -> Result<(String, String), Reply> {
            let value = std::str::from_utf8(h.value).map_err(|e| wrong(&e.to_string()))?;
            Ok((h.name.to_string(), value.to_string()))
        };
        let headers = head.headers.iter().map(header).collect::<Result<Vec<_>, Reply>>()?;
        let request = Request {
            method: head.method.unwrap_or_default().into(),
            target: head.path.unwrap_or_default().into(),
            body: Vec::new(),
            headers,
        };
        Ok(Some((request, length)))
    }

    /// How long the body is.
    fn length(&self) -> Result<usize, Reply> {
        if self.header("Transfer-Encoding").is_some() {
            return Err(Reply::error(411, "a body is sent with its Content-Length"));
        }
        let Some(text) = self.header("Content-Length") else { return Ok(0) };
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        if !digits {
            return Err(Reply::error(400, "Content-Length is no number"));
        }
        // What does not fit into a number is too long too.
        text.parse().ok().filter(|n| *n <= MAX_BODY).ok_or_else(|| {
            Reply::error(413, &format!("a body of {text} bytes is too long: it has at most {MAX_BODY}"))
        })
    }

    /// Reads a request; none where nothing came.
    fn read(stream: &TcpStream) -> Result<Option<Request>, Reply> {
        let until = Instant::now() + PATIENCE;
        let late = |what: &str| Reply::error(408, &format!("{what} did not arrive"));
        let mut bytes = Vec::new();
        let (mut request, head) = loop {
            if let Some(found) = Request::head(&bytes)? {
                break found;
            }
            if !more(stream, &mut bytes, until) {
                return if bytes.is_empty() { Ok(None) } else { Err(late("the request's head")) };
            }
        };
        let length = request.length()?;
        request.body = bytes.split_off(head);
        while request.body.len() < length {
            if !more(stream, &mut request.body, until) {
                return Err(late("the body"));
            }
        }
        request.body.truncate(length);
        Ok(Some(request))
    }
}

/// A response.
#[derive(Debug)]
pub(super) struct Reply {
    pub status: u16,
    /// The content's type.
    pub kind: &'static str,
    pub content: Vec<u8>,
}

impl Reply {
    pub fn json(status: u16, value: &Value) -> Reply {
        Reply { status, kind: "application/json", content: value.to_string().into_bytes() }
    }

    pub fn error(status: u16, why: &str) -> Reply {
        Reply::json(status, &json!({"error": why}))
    }

    fn write(&self, mut stream: &TcpStream) -> std::io::Result<()> {
        let mut head = format!("HTTP/1.1 {} \r\n", self.status);
        let length = self.content.len().to_string();
        for (name, value) in
            HEADERS.into_iter().chain([("Content-Type", self.kind), ("Content-Length", &length)])
        {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(&[head.as_bytes(), b"\r\n", &self.content].concat())?;
        stream.shutdown(Shutdown::Write)
    }
}

/// A request, and where its answer goes.
#[derive(Debug)]
pub(super) struct Exchange {
    pub request: Request,
    reply: Sender<Reply>,
    written: Receiver<()>,
}

impl Exchange {
    /// Answers the request; what is given back can be waited on until the answer is written.
    pub fn answer(self, reply: Reply) -> Written {
        // Whoever asked may be gone.
        let _ = self.reply.send(reply);
        Written(self.written)
    }
}

/// An answer under way.
#[derive(Debug)]
pub(super) struct Written(Receiver<()>);

impl Written {
    /// Waits until the answer is written, or nobody takes it.
    pub fn wait(self) {
        let _ = self.0.recv_timeout(PATIENCE);
    }
}

/// A server on 127.0.0.1.
#[derive(Debug)]
pub(super) struct Server {
    address: SocketAddr,
    closed: Arc<AtomicBool>,
    exchanges: Receiver<Exchange>,
}

impl Server {
    /// Listens on `port`; 0 is any that is free.
    pub fn listen(port: u16) -> std::io::Result<Server> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
        let address = listener.local_addr()?;
        let closed = Arc::new(AtomicBool::new(false));
        let (sender, exchanges) = channel();
        let ends = closed.clone();
        std::thread::Builder::new().spawn(move || accept(&listener, &ends, &sender))?;
        Ok(Server { address, closed, exchanges })
    }

    /// The port that it listens on.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// The next request, if one arrives in this time.
    pub fn next(&self, wait: Duration) -> Option<Exchange> {
        self.exchanges.recv_timeout(wait).ok()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
        // A connection wakes the thread that waits for one.
        let _ = TcpStream::connect_timeout(&self.address, PAUSE);
    }
}

/// Takes connections until `closed`.
fn accept(listener: &TcpListener, closed: &AtomicBool, exchanges: &Sender<Exchange>) {
    let mut open: VecDeque<Weak<TcpStream>> = VecDeque::new();
    loop {
        let accepted = listener.accept();
        if closed.load(Ordering::Relaxed) {
            return;
        }
        let stream = match accepted {
            Ok((stream, _)) => Arc::new(stream),
            Err(e) => {
                // No more files can be open, say: those that are do not stay for ever.
                tracing::debug!("no connection could be taken: {e}");
                std::thread::sleep(PAUSE);
                continue;
            }
        };
        open.retain(|s| s.strong_count() > 0);
        while open.len() >= MAX_OPEN {
            if let Some(oldest) = open.pop_front().and_then(|s| s.upgrade()) {
                let _ = oldest.shutdown(Shutdown::Both);
            }
        }
        open.push_back(Arc::downgrade(&stream));
        let exchanges = exchanges.clone();
        if let Err(e) = std::thread::Builder::new().spawn(move || converse(&stream, &exchanges)) {
            tracing::debug!("no thread for a connection: {e}");
        }
    }
}

/// Reads the one request of a connection and writes its answer.
fn converse(stream: &TcpStream, exchanges: &Sender<Exchange>) {
    let (writing, written) = channel::<()>();
    let reply = match Request::read(stream) {
        Ok(None) => return,
        Err(refusal) => refusal,
        Ok(Some(request)) => {
            let (reply, answer) = channel();
            // No answer: the server is at its end.
            if exchanges.send(Exchange { request, reply, written }).is_err() {
                return;
            }
            let Ok(answer) = answer.recv() else { return };
            answer
        }
    };
    // A page that was closed meanwhile is no error, and its decision is on the disk.
    if let Err(e) = reply.write(stream) {
        tracing::debug!("a page went away: {e}");
        return;
    }
    drop(writing);
    // To close on what was sent and not read would take the answer away from the sender.
    let until = Instant::now() + LINGER;
    let mut rest = Vec::new();
    while more(stream, &mut rest, until) {
        rest.clear();
    }
}

/// Appends what comes next; false at the end, or if nothing came `until` then.
fn more(mut stream: &TcpStream, bytes: &mut Vec<u8>, until: Instant) -> bool {
    let mut buffer = [0; 1 << 13];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        // A timeout of nothing would be none.
        if left.is_zero() || stream.set_read_timeout(Some(left)).is_err() {
            return false;
        }
        match stream.read(&mut buffer) {
            Ok(0) => return false,
            Ok(n) => {
                bytes.extend_from_slice(&buffer[..n]);
                return true;
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
}
