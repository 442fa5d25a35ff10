//! One exchange with an OpenAI-compatible chat endpoint, and what each way to fail means.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustls::RootCertStore;
use serde_json::{Map, Value, json};
use ureq::Agent;
use ureq::http::{StatusCode, Uri};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};

use super::ledger::Answer;
use crate::checkpoint::json;
use crate::error::{Error, Result};

/// The most bytes of an answer that are read.
const MAX_BODY: u64 = 16 << 20;
/// The most bytes of a file of authorities: ten times those that browsers trust.
const MAX_CA: u64 = 4 << 20;
/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(20);
/// More tokens than any one exchange has: what an endpoint counts beyond is no count.
const MAX_TOKENS: u64 = 1 << 24;
/// Keys shorter than this are placeholders for servers that want none, and words of answers.
const SECRET: usize = 12;

/// A key that is shown to the endpoint and to nobody else.
#[derive(Clone)]
pub struct Key(String);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

impl Key {
    /// The key in the environment variable `name`, without white space around it; none if it is not set or empty.
    pub fn from_env(name: &str) -> Result<Option<Key>> {
        let wrong = || Error::Usage(format!("${name} is no key: it holds characters that no header can"));
        match std::env::var(name) {
            Ok(text) if text.trim().is_empty() => Ok(None),
            Ok(text) if text.trim().bytes().all(|b| b.is_ascii_graphic()) => {
                Ok(Some(Key(text.trim().to_string())))
            }
            Ok(_) | Err(std::env::VarError::NotUnicode(_)) => Err(wrong()),
            Err(std::env::VarError::NotPresent) => Ok(None),
        }
    }

    /// `text` without the key, which an endpoint may repeat.
    fn hidden(&self, text: String) -> String {
        if self.0.len() < SECRET { text } else { text.replace(&self.0, "[key]") }
    }
}

/// Why an exchange gave no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The endpoint will never answer this request; it may answer others.
    Request(String),
    /// It may answer later, after this time if it said so. `crowded`: it has too many requests, whoever sends them.
    Later {
        /// What it said.
        why: String,
        /// How long to wait.
        after: Option<Duration>,
        /// Whether other requests should wait too.
        crowded: bool,
    },
    /// Nobody answers there: not worth waiting for unless it answered before.
    Absent(String),
    /// What came back is no answer.
    Garbage(String),
    /// It will answer nothing.
    Fatal(String),
}

/// Where questions are asked, of which model, how.
#[derive(Debug)]
pub struct Endpoint {
    agent: Agent,
    url: String,
    model: String,
    key: Option<Key>,
    /// Where the key comes from, for errors.
    key_env: String,
    temperature: Option<f64>,
    answer_tokens: Option<u64>,
    warnings: Vec<String>,
}

/// What an endpoint is made of.
#[derive(Clone, Debug)]
pub struct EndpointOptions {
    /// `http(s)://host[:port]/v1`.
    pub base_url: String,
    /// The model's name there.
    pub model: String,
    /// The authorities that vouch for the endpoint, a PEM file; those that browsers trust if none.
    pub ca: Option<PathBuf>,
    /// The environment variable with the key.
    pub key_env: String,
    /// The temperature; the endpoint's own if none.
    pub temperature: Option<f64>,
    /// The most tokens of an answer; the endpoint's own limit if none.
    pub answer_tokens: Option<u64>,
    /// How long an answer may take.
    pub timeout: Duration,
    /// Connections that are kept.
    pub connections: usize,
}

impl Endpoint {
    /// The endpoint that `options` mean. Nothing is sent.
    ///
    /// The URL is that of the API (`…/v1`) or of its `chat/completions`; it is an error if it has user, password, query
    /// or fragment, or is neither http nor https, or if the file of authorities holds none or what is none.
    pub fn new(options: &EndpointOptions) -> Result<Endpoint> {
        let wrong = |why: &str| Error::Usage(format!("--base-url {why}"));
        let typed = options.base_url.trim().trim_end_matches('/');
        // A URL with a secret in it is not repeated.
        if typed.contains('@') {
            return Err(wrong(&format!(
                "holds an @: a key goes into ${}, not into the URL",
                options.key_env
            )));
        }
        if typed.contains(['?', '#']) {
            return Err(wrong("holds a ? or #, expected http(s)://host/v1"));
        }
        let uri: Uri = typed.parse().map_err(|e| wrong(&format!("is {typed:?}, which is no URL: {e}")))?;
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_string();
        let scheme = uri.scheme_str().unwrap_or_default();
        if host.is_empty() || !["http", "https"].contains(&scheme) {
            return Err(wrong(&format!("is {typed:?}, expected http(s)://host/v1")));
        }
        if options.ca.is_some() && scheme == "http" {
            return Err(wrong("is http, where --ca means nothing: give https, or leave --ca out"));
        }
        let local = host == "localhost" || host.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback());
        let key = Key::from_env(&options.key_env)?;
        let mut warnings = Vec::new();
        if key.is_some() && scheme == "http" && !local {
            warnings.push(format!(
                "the key in ${} goes to {host} unencrypted: the URL is no https",
                options.key_env
            ));
        }
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            // A redirect is an error here: a question does not survive one, and the key must not take part in it.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_global(Some(options.timeout))
            .timeout_connect(Some(CONNECT.min(options.timeout)))
            .max_idle_connections_per_host(options.connections)
            .max_idle_connections(options.connections)
            .user_agent(concat!("anabranch/", env!("CARGO_PKG_VERSION")));
        if local {
            config = config.proxy(None);
        }
        if let Some(path) = &options.ca {
            config = config.tls_config(TlsConfig::builder().root_certs(authorities(path)?).build());
        }
        let path = if typed.ends_with("/chat/completions") { "" } else { "/chat/completions" };
        Ok(Endpoint {
            agent: Agent::new_with_config(config.build()),
            url: format!("{typed}{path}"),
            model: options.model.clone(),
            key,
            key_env: options.key_env.clone(),
            temperature: options.temperature,
            answer_tokens: options.answer_tokens,
            warnings,
        })
    }

    /// What the user should know.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The model's name, without the folders of a server that names models by their paths.
    pub fn model(&self) -> &str {
        match self.model.starts_with('/') {
            true => self.model.rsplit('/').find(|part| !part.is_empty()).unwrap_or(&self.model),
            false => &self.model,
        }
    }

    /// The request that asks for the next message after `messages`, the user's and the model's in turn. Its bytes are
    /// the answer's identity: they hold the model and how it is asked, not where.
    pub fn request(&self, messages: &[String]) -> Vec<u8> {
        let said = |(n, text): (usize, &String)| json!({"role": if n % 2 == 0 { "user" } else { "assistant" }, "content": text});
        let mut request = Map::new();
        request.insert("model".into(), self.model.clone().into());
        request.insert("messages".into(), messages.iter().enumerate().map(said).collect());
        if let Some(t) = self.temperature {
            request.insert("temperature".into(), t.into());
        }
        if let Some(n) = self.answer_tokens {
            request.insert("max_tokens".into(), n.into());
        }
        request.insert("stream".into(), false.into());
        Value::Object(request).to_string().into_bytes()
    }

    /// Sends `request` once.
    pub fn exchange(&self, request: &[u8]) -> Result<Answer, Failure> {
        let mut post = self.agent.post(&self.url).content_type("application/json");
        if let Some(Key(key)) = &self.key {
            post = post.header("authorization", format!("Bearer {key}"));
        }
        let mut response = post.send(request).map_err(|e| self.broken(&e))?;
        let status = response.status();
        let header =
            |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_string);
        if status.is_redirection() {
            let to = self.shown(header("location").as_deref().unwrap_or("nowhere"));
            let why =
                format!("redirects to {to}, which is not followed: give that as --base-url if it is right");
            return Err(Failure::Fatal(self.told(&why)));
        }
        let html =
            header("content-type").is_some_and(|t| t.trim().to_ascii_lowercase().starts_with("text/html"));
        let after = header("retry-after").and_then(|v| retry_after(&v, SystemTime::now()));
        let body = match response.body_mut().with_config().limit(MAX_BODY).read_to_vec() {
            Ok(body) => body,
            Err(ureq::Error::BodyExceedsLimit(_)) if status.is_success() => {
                return Err(Failure::Request(format!("its answer has more than {MAX_BODY} bytes")));
            }
            // Of a refusal the status says enough.
            Err(_) if !status.is_success() => Vec::new(),
            Err(e) => return Err(self.broken(&e)),
        };
        if status.is_success() {
            self.answer(request.len(), &body, html)
        } else {
            Err(self.refusal(status, &body, after))
        }
    }

    /// `the endpoint URL` and what it did.
    fn told(&self, did: &str) -> String {
        format!("the endpoint {} {did}", self.url)
    }

    /// The beginning of `text` in one line, without the key.
    fn shown(&self, text: &str) -> String {
        // Cut after the key is out, so that no half of it stays.
        let text = self.hidden(text.to_string());
        let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let plain: String = line.chars().filter(|c| !c.is_control()).take(200).collect();
        if plain.chars().count() < line.chars().count() { format!("{plain} …") } else { plain }
    }

    fn hidden(&self, text: String) -> String {
        match &self.key {
            Some(key) => key.hidden(text),
            None => text,
        }
    }

    /// No response, or half of one.
    fn broken(&self, error: &ureq::Error) -> Failure {
        use ureq::Error as E;
        match error {
            E::Timeout(ureq::Timeout::Resolve | ureq::Timeout::Connect)
            | E::HostNotFound
            | E::ConnectionFailed => Failure::Absent(self.told(&format!("cannot be reached ({error})"))),
            E::Io(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
                Failure::Absent(self.told("refuses connections: is it running there?"))
            }
            e if insecure(e) => {
                let why = self.shown(&e.to_string());
                let hint = if why.contains("UnknownIssuer") {
                    ": give a private authority's certificate as --ca"
                } else {
                    ""
                };
                Failure::Absent(self.told(&format!("cannot be reached safely ({why}){hint}")))
            }
            E::Timeout(_) => Failure::Later {
                why: self.told("did not answer in the time that --timeout gives"),
                after: None,
                crowded: false,
            },
            E::BadUri(_) | E::Http(_) | E::RequireHttpsOnly(_) => {
                Failure::Fatal(self.told(&format!("cannot be asked ({})", self.shown(&error.to_string()))))
            }
            E::Io(_) => Failure::Later {
                why: self.told(&format!("broke off ({})", self.shown(&error.to_string()))),
                after: None,
                crowded: false,
            },
            _ => Failure::Garbage(self.told(&format!("sends no HTTP ({})", self.shown(&error.to_string())))),
        }
    }

    fn refusal(&self, status: StatusCode, body: &[u8], after: Option<Duration>) -> Failure {
        let text = String::from_utf8_lossy(body);
        let value = json::parse_line(body).ok();
        let error = value.as_ref().and_then(|v| v.get("error").or(Some(v)));
        let message = error.and_then(message).unwrap_or(&text);
        let said = match self.shown(message) {
            said if said.is_empty() => String::new(),
            said => format!(": {said}"),
        };
        let told = |did: &str| self.told(&format!("{did} ({}){said}", status.as_u16()));
        match status.as_u16() {
            _ if about_this_request(status.as_u16(), error, message) => {
                Failure::Request(format!("refuses ({}){said}", status.as_u16()))
            }
            401 | 403 => Failure::Fatal(match &self.key {
                Some(_) => told(&format!("does not take the key in ${}", self.key_env)),
                None => told(&format!("wants a key, and ${} is not set", self.key_env)),
            }),
            402 => Failure::Fatal(told("wants to be paid")),
            404 => {
                Failure::Fatal(told(&format!("has no chat/completions there or no model {:?}", self.model)))
            }
            429 => Failure::Later { why: told("has too many requests"), after, crowded: true },
            408 | 425 | 500..=599 => {
                Failure::Later { why: told("cannot answer now"), after, crowded: status.as_u16() == 503 }
            }
            _ => Failure::Fatal(told("refuses the request")),
        }
    }

    /// A chat completion, the answer to `asked` bytes.
    fn answer(&self, asked: usize, body: &[u8], html: bool) -> Result<Answer, Failure> {
        let text = String::from_utf8_lossy(body);
        if html
            || text
                .trim_start()
                .get(..5)
                .is_some_and(|s| s.eq_ignore_ascii_case("<html") || s.eq_ignore_ascii_case("<!doc"))
        {
            let why = format!(
                "answers with a web page ({}): the URL should be that of the API, …/v1",
                self.shown(&text)
            );
            return Err(Failure::Fatal(self.told(&why)));
        }
        let garbage =
            |why: String| Failure::Garbage(self.told(&format!("answers with no chat completion: {why}")));
        let value: Value = serde_json::from_slice(body)
            .map_err(|e| garbage(format!("{} bytes are no JSON ({e}): {}", body.len(), self.shown(&text))))?;
        if let Some(error) = value.get("error").filter(|e| !e.is_null()) {
            let shown = self.shown(&error.to_string());
            // A proxy answers 200 and tells the status that it was given itself.
            let code = error.get("code").and_then(Value::as_u64);
            let status = code.map_or(400, |code| u16::try_from(code).unwrap_or_default());
            let about = about_this_request(status, Some(error), message(error).unwrap_or_default());
            return Err(if about {
                Failure::Request(format!("refuses (200): {shown}"))
            } else {
                garbage(shown)
            });
        }
        let choice = value.pointer("/choices/0");
        let message = choice.and_then(|c| c.get("message")).and_then(Value::as_object);
        let (Some(choice), Some(message)) = (choice, message) else {
            return Err(garbage(format!("it has no choices[0].message: {}", self.shown(&text))));
        };
        let content = match message.get("content") {
            Some(Value::String(s)) => s.clone(),
            // A message in parts, of which the texts count.
            Some(Value::Array(parts)) => parts.iter().filter_map(|p| p.get("text")?.as_str()).collect(),
            None | Some(Value::Null) => String::new(),
            Some(other) => {
                return Err(garbage(format!("the message's content is {}", self.shown(&json::kind(other)))));
            }
        };
        let string = |v: Option<&Value>| v.and_then(Value::as_str).map(|s| self.hidden(s.to_string()));
        let content = self.hidden(content);
        let reasoning = string(message.get("reasoning_content").or_else(|| message.get("reasoning")));
        let told = value.pointer("/usage/total_tokens").and_then(Value::as_u64);
        let told = told.filter(|n| (1..=MAX_TOKENS).contains(n));
        // Where the endpoint does not count, four bytes are a token.
        let bytes = asked + content.len() + reasoning.as_ref().map_or(0, String::len);
        let tokens = told.unwrap_or(bytes.div_ceil(4) as u64);
        Ok(Answer::Said { content, reasoning, finish: string(choice.get("finish_reason")), tokens })
    }
}

/// The certificates in the PEM file at `path`.
fn authorities(path: &Path) -> Result<RootCerts> {
    let text = json::read_at_most(path, MAX_CA)?;
    let mut found = Vec::new();
    for item in parse_pem(&text) {
        let wrong = |e: &dyn fmt::Display| {
            Error::file(path, format!("certificate {} cannot be read: {e}", found.len() + 1))
        };
        if let PemItem::Certificate(certificate) = item.map_err(|e| wrong(&e))? {
            // What cannot be read would later be left out without a word.
            RootCertStore::empty().add(certificate.der().into()).map_err(|e| wrong(&e))?;
            found.push(certificate);
        }
    }
    if found.is_empty() {
        let why = "holds no certificate, expected PEM: -----BEGIN CERTIFICATE----- and what follows";
        return Err(Error::file(path, why));
    }
    Ok(found.into())
}

/// Whether TLS, or a proxy, stands in the way.
fn insecure(error: &ureq::Error) -> bool {
    use ureq::Error as E;
    match error {
        E::Tls(_) | E::Rustls(_) | E::ConnectProxyFailed(_) | E::InvalidProxyUrl => true,
        E::Io(e) => e.get_ref().is_some_and(|e| e.is::<rustls::Error>()),
        _ => false,
    }
}

/// What an error's object says, or the error itself where it is a text.
fn message(error: &Value) -> Option<&str> {
    error.get("message").unwrap_or(error).as_str()
}

/// Whether a refusal is about this request alone: it is longer than the model's context, or its content is not let
/// through.
fn about_this_request(status: u16, error: Option<&Value>, message: &str) -> bool {
    let field = |name: &str| error.and_then(|e| e.get(name)).and_then(Value::as_str).unwrap_or_default();
    let said = format!("{} {} {message}", field("code"), field("type")).to_lowercase();
    let says = |parts: &[&str]| parts.iter().any(|part| said.contains(part));
    let length = [
        "context_length",
        "context length",
        "context size",
        "context window",
        "exceed_context",
        "maximum context",
        "max_model_len",
        "too many tokens",
        "input is too long",
        "prompt is too long",
        "string_above_max_length",
    ];
    let content = [
        "content_filter",
        "content management policy",
        "content policy",
        "content_policy",
        "moderation",
        "input was flagged",
        "prompt was flagged",
    ];
    match status {
        413 => true,
        400 | 422 => says(&length) || says(&content),
        // Who may ask at all is decided by the key, what may be asked by the content.
        403 => says(&content) && !says(&["api key", "api_key", "api-key"]),
        _ => false,
    }
}

/// `Retry-After`: seconds, or a date.
fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let at = httpdate::parse_http_date(value).ok()?;
    Some(at.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    fn options(base_url: &str) -> EndpointOptions {
        EndpointOptions {
            base_url: base_url.into(),
            model: "m".into(),
            ca: None,
            key_env: "ANABRANCH_TEST_NO_KEY".into(),
            temperature: Some(0.5),
            answer_tokens: None,
            timeout: Duration::from_secs(1),
            connections: 1,
        }
    }

    #[test]
    fn urls_that_mean_nothing_or_hold_a_secret_are_refused() {
        for (url, expected) in [
            ("https://api.example.com/v1/", "https://api.example.com/v1/chat/completions"),
            ("http://[::1]:8000/v1/chat/completions", "http://[::1]:8000/v1/chat/completions"),
        ] {
            assert_eq!(Endpoint::new(&options(url)).unwrap().url, expected);
        }
        for url in [
            "",
            "api.example.com/v1",
            "ftp://x/v1",
            "https:///v1",
            "https://u:hunter2hunter2@x/v1",
            "https://x/v1?key=hunter2hunter2",
            "not a url",
        ] {
            let err = Endpoint::new(&options(url)).unwrap_err();
            assert_eq!(err.exit_code(), 2);
            assert!(!err.to_string().contains("hunter2"), "{err}");
        }
    }

    #[test]
    fn files_that_are_no_authorities_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        let said = |url: &str| {
            let options = EndpointOptions { ca: Some(path.clone()), ..options(url) };
            Endpoint::new(&options).unwrap_err().to_string()
        };
        let pem = |what: &str, text: &str| format!("-----BEGIN {what}-----\n{text}\n-----END {what}-----\n");
        for (text, expected) in [
            (String::new(), "holds no certificate"),
            ("-- what a browser shows --".into(), "holds no certificate"),
            (pem("PRIVATE KEY", "MAA="), "holds no certificate"),
            (pem("CERTIFICATE", "MAA="), "certificate 1 cannot be read"),
            (pem("CERTIFICATE", "!"), "certificate 1 cannot be read"),
            ("-----BEGIN CERTIFICATE-----\nMAA=\n".into(), "certificate 1 cannot be read"),
        ] {
            std::fs::write(&path, &text).unwrap();
            let err = said("https://localhost:1/v1");
            assert!(err.contains("ca.pem") && err.contains(expected), "{text}: {err}");
        }
        assert!(said("http://localhost:1/v1").contains("is http, where --ca means nothing"));
        std::fs::remove_file(&path).unwrap();
        assert!(said("https://localhost:1/v1").contains("ca.pem"));
    }

    #[test]
    fn the_request_is_the_same_bytes_wherever_it_goes() {
        let messages = ["hi".to_string(), "{\"a\"".to_string(), "again".to_string()];
        let request = |url: &str| Endpoint::new(&options(url)).unwrap().request(&messages);
        let text = String::from_utf8(request("http://localhost:1/v1")).unwrap();
        assert_eq!(text, request("https://x/v1").into_iter().map(char::from).collect::<String>());
        assert_eq!(
            text,
            r#"{"model":"m","messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"{\"a\""},{"role":"user","content":"again"}],"temperature":0.5,"stream":false}"#
        );
    }

    #[test]
    fn the_time_to_wait_is_read_in_both_forms() {
        let now = UNIX_EPOCH + Duration::from_secs(1_445_412_480);
        for (value, expected) in [
            ("7", Some(7)),
            (" 120 ", Some(120)),
            ("Wed, 21 Oct 2015 07:28:30 GMT", Some(30)),
            ("Wed, 21 Oct 2015 07:27:00 GMT", Some(0)),
            ("-3", None),
            ("1e400", None),
            ("soon", None),
        ] {
            assert_eq!(retry_after(value, now).map(|d| d.as_secs()), expected, "{value}");
        }
    }

    #[test]
    fn a_refusal_of_one_request_does_not_end_the_run() {
        let endpoint = Endpoint::new(&options("http://localhost:1/v1")).unwrap();
        let failure = |status: u16, error: &Value| {
            let body = json!({"error": error}).to_string();
            match StatusCode::from_u16(status).unwrap() {
                ok if ok.is_success() => endpoint.answer(40, body.as_bytes(), false).unwrap_err(),
                refused => endpoint.refusal(refused, body.as_bytes(), None),
            }
        };
        let llama = json!({"code": 400, "message": "the request exceeds the available context size, try increasing it", "type": "exceed_context_size_error"});
        let long = json!({"message": "This model's maximum context length is 4096 tokens", "code": "context_length_exceeded"});
        let flagged = json!({"code": 403, "message": "m requires moderation. Your input was flagged for \"violence\"", "metadata": {}});
        for (status, error) in [
            (400, &llama),
            (400, &json!({"type": "exceed_context_size_error"})),
            (400, &json!({"message": "Input is too long for requested model."})),
            (413, &json!({})),
            (403, &flagged),
            (403, &json!({"code": "content_policy_violation", "message": "refused"})),
            (200, &llama),
            (200, &long),
            (200, &flagged),
            (200, &json!("prompt is too long: 5000 tokens")),
        ] {
            let failure = failure(status, error);
            let Failure::Request(why) = &failure else { panic!("{status} {error}: {failure:?}") };
            assert!(why.starts_with(&format!("refuses ({status})")), "{why}");
        }
        for (status, error) in [
            (403, json!({"message": "Incorrect API key provided", "code": "invalid_api_key"})),
            (403, json!({"message": "API key disabled by moderation"})),
            (403, json!({"message": "the context size is not in your plan"})),
            (401, json!({"message": "content_filter"})),
            (400, json!({"message": "unknown field"})),
        ] {
            let failure = failure(status, &error);
            assert!(matches!(failure, Failure::Fatal(_)), "{status} {error}: {failure:?}");
        }
        for error in [
            json!({"message": "overloaded"}),
            json!({"code": 429, "message": "too many tokens in a minute"}),
            json!({"code": 70_000, "message": "maximum context length"}),
        ] {
            let failure = failure(200, &error);
            assert!(matches!(failure, Failure::Garbage(_)), "{error}: {failure:?}");
        }
    }

    #[test]
    fn tokens_are_counted_where_the_endpoint_s_count_is_none() {
        let endpoint = Endpoint::new(&options("http://localhost:1/v1")).unwrap();
        for (usage, expected) in [
            (json!({"total_tokens": 7}), 7),
            (json!({"total_tokens": MAX_TOKENS}), MAX_TOKENS),
            (json!({"total_tokens": 0}), 11),
            (json!({"total_tokens": MAX_TOKENS + 1}), 11),
            (json!({"total_tokens": u64::MAX}), 11),
            (json!({"total_tokens": -3}), 11),
            (json!({"total_tokens": "7"}), 11),
            (json!(null), 11),
        ] {
            let body = json!({"choices": [{"message": {"content": "two"}}], "usage": usage}).to_string();
            match endpoint.answer(40, body.as_bytes(), false) {
                Ok(Answer::Said { tokens, .. }) => assert_eq!(tokens, expected, "{usage}"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_key_that_comes_back_is_taken_out() {
        let mut endpoint = Endpoint::new(&options("http://localhost:1/v1")).unwrap();
        let key = "sk-0123456789abcdef";
        endpoint.key = Some(Key(key.into()));
        let body = json!({"choices": [{"message": {"content": format!("your key is {key}"), "reasoning_content": key}, "finish_reason": "stop"}]});
        let answer = endpoint.answer(40, body.to_string().as_bytes(), false).unwrap();
        assert_eq!(
            answer,
            Answer::Said {
                content: "your key is [key]".into(),
                reasoning: Some("[key]".into()),
                finish: Some("stop".into()),
                tokens: 16
            }
        );
        let body =
            json!({"error": {"message": format!("Incorrect API key: {key}"), "code": "invalid_api_key"}});
        for status in [400, 401, 413, 429, 500] {
            let failure =
                endpoint.refusal(StatusCode::from_u16(status).unwrap(), body.to_string().as_bytes(), None);
            let said = format!("{failure:?} {endpoint:?}");
            assert!(!said.contains("0123456789"), "{said}");
            assert!(said.contains("[key]"), "{said}");
        }
        for body in [format!("{key} {key}"), format!("<html>{key}"), format!("{{\"error\": \"{key}\"}}")] {
            let failure = format!("{:?}", endpoint.answer(0, body.as_bytes(), false));
            assert!(!failure.contains("0123456789") && failure.contains("[key]"), "{failure}");
        }
        for placeholder in ["EMPTY", "x"] {
            endpoint.key = Some(Key(placeholder.into()));
            assert_eq!(endpoint.hidden("EMPTY x".into()), "EMPTY x");
        }
    }
}
