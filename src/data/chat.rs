//! Chat templates: messages to the text that the model was taught, and which of it the assistant says.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, State, UndefinedBehavior, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Serialize;
use serde_json::Value as Json;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use super::date::strftime;
use super::foreign;
use crate::error::{Error, Result};

/// Bounds what one rendering may compute and allocate, about 64 bytes each: far more than any real template takes.
const FUEL: u64 = 2_000_000;
/// The longest text that a method may make, which costs no fuel.
const MOST_TEXT: usize = 64 << 20;
/// The longest template that is read: how deep one nests grows with it.
const MOST_SOURCE: usize = 64 << 10;
const NAME: &str = "chat_template";

/// A compiled chat template, in the dialect that transformers gives templates: Jinja with `trim_blocks` and
/// `lstrip_blocks`, Python's string and mapping methods, `raise_exception`, `strftime_now`, and a `tojson` that does
/// not escape HTML.
///
/// It is another's program: it is compiled and rendered where a stack that overflows, or a rendering that does not end,
/// are errors.
pub struct ChatTemplate {
    env: Arc<Environment<'static>>,
    /// It did not come back once; it is not called again.
    lost: AtomicBool,
}

/// A conversation as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversation {
    /// What the template makes of all messages.
    pub text: String,
    /// The byte ranges of `text` that are assistant turns, what ends a turn included.
    pub assistant: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// Compiles `source`, which stands in the file `path`; `special` are the special tokens by name
    /// (`bos_token`, …), `now` is the moment that `strftime_now` tells.
    pub fn compile(
        path: &Path,
        source: &str,
        special: &[(String, String)],
        now: SystemTime,
    ) -> Result<ChatTemplate> {
        let failed = |why: String| Error::file(PathBuf::from(path), format!("chat template: {why}"));
        if source.len() > MOST_SOURCE {
            return Err(failed(format!("has {} bytes, at most {MOST_SOURCE} are read", source.len())));
        }
        let (source, special) = (plain_generation_blocks(source), special.to_vec());
        let made = foreign::apart(move || environment(source, &special, now).map_err(|e| e.to_string()));
        let env = made.and_then(|env| env).map_err(failed)?;
        Ok(ChatTemplate { env: Arc::new(env), lost: AtomicBool::new(false) })
    }

    /// The text of `messages`; with `prompt`, what comes before the assistant's next turn is added. The error says
    /// what the template objects to.
    pub fn render(&self, messages: &[Json], tools: Option<&Json>, prompt: bool) -> Result<String, String> {
        self.call(messages, tools, move |env, messages, tools| render(env, messages, tools, prompt))
    }

    /// The text of `messages` and where the assistant speaks in it.
    ///
    /// An assistant turn begins where the text of the messages before it, with what prompts the assistant, parts
    /// from the whole, and ends where the text of the messages up to it ends; so a template that changes earlier
    /// messages when later ones come is an error.
    pub fn conversation(&self, messages: &[Json], tools: Option<&Json>) -> Result<Conversation, String> {
        self.call(messages, tools, conversation)
    }

    fn call<R: Send + 'static>(
        &self,
        messages: &[Json],
        tools: Option<&Json>,
        call: impl FnOnce(&Environment<'static>, &[Json], Option<&Json>) -> Result<R, String> + Send + 'static,
    ) -> Result<R, String> {
        if self.lost.load(Ordering::Relaxed) {
            return Err("chat template: did not come back from a line before".into());
        }
        let (env, messages, tools) = (Arc::clone(&self.env), messages.to_vec(), tools.cloned());
        foreign::apart(move || call(&env, &messages, tools.as_ref())).unwrap_or_else(|why| {
            self.lost.store(true, Ordering::Relaxed);
            Err(format!("chat template: {why}"))
        })
    }
}

/// The dialect, with the template `source` in it.
fn environment(
    source: String,
    special: &[(String, String)],
    now: SystemTime,
) -> Result<Environment<'static>, minijinja::Error> {
    let mut env = Environment::new();
    env.set_syntax(minijinja::syntax::SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_fuel(Some(FUEL));
    env.set_unknown_method_callback(python_method);
    for (name, text) in special {
        env.add_global(name.clone(), text.clone());
    }
    env.add_filter("tojson", to_json);
    env.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", move |format: String| {
        strftime(&format, now).map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e))
    });
    env.add_template_owned(NAME, source)?;
    Ok(env)
}

/// Python's methods of strings and mappings; those that make a text far longer than what they are given are bounded.
fn python_method(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, minijinja::Error> {
    let size = match (method, value.as_str(), args) {
        ("replace", Some(s), [from, to, ..]) => {
            let (from, to) = (from.as_str().unwrap_or_default(), to.as_str().unwrap_or_default());
            s.matches(from).count().saturating_mul(to.len())
        }
        // A width that is written out in the format.
        ("format", Some(s), _) => {
            let width = s.split(|c: char| !c.is_ascii_digit()).filter(|w| !w.is_empty());
            width.map(|w| w.parse().unwrap_or(usize::MAX)).max().unwrap_or(0)
        }
        ("join", Some(s), [list]) => list.len().unwrap_or(0).saturating_mul(s.len()),
        _ => 0,
    };
    if size > MOST_TEXT {
        let why = format!("{method} makes a text of {size} bytes, at most {MOST_TEXT} are made");
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, why));
    }
    unknown_method_callback(state, value, method, args)
}

fn render(
    env: &Environment<'static>,
    messages: &[Json],
    tools: Option<&Json>,
    prompt: bool,
) -> Result<String, String> {
    let template = env.get_template(NAME).map_err(|e| e.to_string())?;
    let given = context! {
        messages => Value::from(Serde(messages)),
        tools => Value::from(Serde(tools)),
        documents => (),
        add_generation_prompt => prompt,
    };
    template.render(given).map_err(|e| format!("chat template: {}", reasons(&e)))
}

/// [`ChatTemplate::conversation`].
fn conversation(
    env: &Environment<'static>,
    messages: &[Json],
    tools: Option<&Json>,
) -> Result<Conversation, String> {
    let text = render(env, messages, tools, false)?;
    let mut assistant = Vec::new();
    for (i, message) in messages.iter().enumerate() {
        if message.get("role").and_then(|r| r.as_str()) != Some("assistant") {
            continue;
        }
        let end = match i + 1 == messages.len() {
            true => text.len(),
            false => {
                let upto = render(env, &messages[..=i], tools, false)?;
                if !text.starts_with(&upto) {
                    return Err(format!(
                        "the chat template renders messages 0..={i} otherwise when more follow, so the \
                             assistant's turns cannot be told apart"
                    ));
                }
                upto.len()
            }
        };
        // Some templates refuse an empty conversation; nothing stands before its first message but the header.
        let start = match render(env, &messages[..i], tools, true) {
            Ok(before) => common_prefix(&text, &before),
            Err(_) if i == 0 => 0,
            Err(e) => return Err(e),
        };
        let floor = assistant.last().map_or(0, |r: &Range<usize>| r.end);
        if start >= end || start < floor {
            return Err(format!("the chat template shows nothing of message {i}, an assistant turn"));
        }
        assistant.push(start..end);
    }
    Ok(Conversation { text, assistant })
}

/// Bytes that both begin with, at a character boundary.
fn common_prefix(a: &str, b: &str) -> usize {
    a.char_indices().zip(b.chars()).find(|((_, x), y)| x != y).map_or(a.len().min(b.len()), |((at, _), _)| at)
}

/// `{% generation %}` blocks, which mark assistant turns for transformers, as blocks that are always taken.
fn plain_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let (before, tag) = rest.split_at(open);
        out.push_str(before);
        let Some(length) = tag[2..].find("%}") else {
            rest = tag;
            break;
        };
        let close = length + 2;
        let inner = &tag[2..close];
        match inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+') {
            "generation" => out.push_str(&format!("{{%{}%}}", inner.replacen("generation", "if true", 1))),
            "endgeneration" => {
                out.push_str(&format!("{{%{}%}}", inner.replacen("endgeneration", "endif", 1)))
            }
            _ => out.push_str(&tag[..close + 2]),
        }
        rest = &tag[close + 2..];
    }
    out.push_str(rest);
    out
}

/// A template's error and what caused it, in one line.
fn reasons(e: &minijinja::Error) -> String {
    let mut text = e.to_string();
    let mut source = std::error::Error::source(e);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn to_json(value: Value, args: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = args.get("indent")?;
    // What transformers also takes and what the output here already is.
    let _: Option<bool> = args.get("ensure_ascii")?;
    args.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut out, Spaced)),
        Some(n) => {
            let spaces = " ".repeat(n.min(16));
            let format = PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut out, format))
        }
    };
    let failed = |e: String| minijinja::Error::new(ErrorKind::BadSerialization, e);
    written.map_err(|e| failed(e.to_string()))?;
    String::from_utf8(out).map(Value::from).map_err(|e| failed(e.to_string()))
}

/// JSON on one line with Python's separators `, ` and `: `.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use serde_json::{Value as Json, json};

    use super::*;

    const CHATML: &str = "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}\
        {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    fn compile(source: &str) -> Result<ChatTemplate> {
        let special =
            [("bos_token".to_string(), "<s>".to_string()), ("eos_token".to_string(), "</s>".to_string())];
        ChatTemplate::compile(Path::new("chat_template.jinja"), source, &special, UNIX_EPOCH)
    }

    fn talk(turns: &[(&str, &str)]) -> Vec<Json> {
        turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect()
    }

    #[test]
    fn assistant_turns_are_found_by_rendering_prefixes() {
        let t = compile(CHATML).unwrap();
        let messages = talk(&[
            ("system", "S"),
            ("user", "U é"),
            ("assistant", "one"),
            ("user", "V"),
            ("assistant", "two"),
        ]);
        let c = t.conversation(&messages, None).unwrap();
        let turns: Vec<&str> = c.assistant.iter().map(|r| &c.text[r.clone()]).collect();
        assert_eq!(turns, ["one<|im_end|>\n", "two<|im_end|>\n"]);
        assert!(c.text.starts_with("<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU é"));
    }

    #[test]
    fn a_real_template_with_loops_methods_and_exceptions() {
        // Mistral's, shortened; the roles must alternate.
        let source = "{%- if messages[0]['role'] == 'system' %}\n    {%- set system = messages[0]['content'] %}\n    {%- set rest = messages[1:] %}\n\
            {%- else %}\n    {%- set rest = messages %}\n{%- endif %}\n{{- bos_token }}\n\
            {%- for m in rest %}\n    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\n        {{- raise_exception('roles must alternate') }}\n    {%- endif %}\n\
            {%- if m.role == 'user' %}\n        {{- '[INST] ' + m['content'].strip() + '[/INST]' }}\n    {%- else %}\n        {% generation %}{{- ' ' + m['content'] + eos_token }}{% endgeneration %}\n    {%- endif %}\n{%- endfor %}";
        let t = compile(source).unwrap();
        let c = t
            .conversation(
                &talk(&[("user", " hi "), ("assistant", "yo"), ("user", "x"), ("assistant", "y")]),
                None,
            )
            .unwrap();
        assert_eq!(c.text, "<s>[INST] hi[/INST] yo</s>[INST] x[/INST] y</s>");
        let turns: Vec<&str> = c.assistant.iter().map(|r| &c.text[r.clone()]).collect();
        assert_eq!(turns, [" yo</s>", " y</s>"]);
        let err = t.conversation(&talk(&[("assistant", "yo"), ("user", "x")]), None).unwrap_err();
        assert!(err.contains("roles must alternate"), "{err}");
    }

    #[test]
    fn a_template_that_rewrites_the_past_is_refused() {
        let t = compile("{% for m in messages %}{{ m.content }}{% if loop.last %}!{% endif %}{% endfor %}")
            .unwrap();
        let err =
            t.conversation(&talk(&[("user", "a"), ("assistant", "b"), ("user", "c")]), None).unwrap_err();
        assert!(err.contains("messages 0..=1"), "{err}");
        let t = compile("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}").unwrap();
        let err = t.conversation(&talk(&[("user", "a"), ("assistant", "b")]), None).unwrap_err();
        assert!(err.contains("nothing of message 1"), "{err}");
    }

    #[test]
    fn filters_and_functions_of_transformers() {
        let t =
            compile("{{ messages[0] | tojson }}|{{ strftime_now('%d %b %Y') }}|{{ tools is none }}").unwrap();
        let text = t.render(&[json!({"b": "<é>", "a": [1, 2.5, null]})], None, false).unwrap();
        assert_eq!(text, r#"{"b": "<é>", "a": [1, 2.5, null]}|01 Jan 1970|True"#);
        let t = compile("{{ messages[0] | tojson(indent=2) }}").unwrap();
        assert_eq!(t.render(&[json!({"a": [1]})], None, false).unwrap(), "{\n  \"a\": [\n    1\n  ]\n}");
    }

    #[test]
    fn bad_templates_are_errors() {
        let err = compile("{% for m in messages %}").err().unwrap().to_string();
        assert!(err.starts_with("chat_template.jinja: chat template:"), "{err}");
        assert!(compile("{{ nothing.here }}").unwrap().render(&[], None, false).is_err());
        let forever = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}x{% endfor %}{% endfor %}{% endfor %}";
        assert!(compile(forever).unwrap().render(&[], None, false).unwrap_err().contains("fuel"));
        for (source, why) in [
            ("{{ ('a' * 100000).replace('a', 'b' * 100000) }}", "replace makes a text of"),
            ("{{ ('a' * 100000).join(range(10000)) }}", "join makes a text of"),
            ("{{ '{:>99999999999}'.format(1) }}", "format makes a text of"),
        ] {
            let err = compile(source).unwrap().render(&[], None, false).unwrap_err();
            assert!(err.contains(why), "{err}");
        }
        let list = "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}";
        let _ = compile(list).unwrap().render(&[], None, false);
        for part in ["-", "not ", "(", "[", "a.", "a|"] {
            let source = format!("{{{{ {}1 }}}}", part.repeat(60_000 / part.len()));
            let _ = compile(&source);
        }
        assert!(compile(&" ".repeat(1 << 17)).err().unwrap().to_string().contains("at most 65536"));
        let deep = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}";
        assert!(compile(deep).unwrap().render(&[], None, false).is_err());
    }
}
