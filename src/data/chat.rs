//! Chat templates: messages to the text that the model was taught, and which of it the assistant says.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value, context};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use super::date::strftime;
use crate::error::{Error, Result};

/// Bounds what one rendering may compute and allocate, about 64 bytes each: far more than any real template takes.
const FUEL: u64 = 5_000_000;
const NAME: &str = "chat_template";

/// A compiled chat template, in the dialect that transformers gives templates: Jinja with `trim_blocks` and
/// `lstrip_blocks`, Python's string and mapping methods, `raise_exception`, `strftime_now`, and a `tojson` that does
/// not escape HTML.
pub struct ChatTemplate {
    env: Environment<'static>,
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
        let mut env = Environment::new();
        let failed =
            |e: &dyn std::fmt::Display| Error::file(PathBuf::from(path), format!("chat template: {e}"));
        let syntax = minijinja::syntax::SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|e| failed(&e))?;
        env.set_syntax(syntax);
        env.set_undefined_behavior(UndefinedBehavior::Lenient);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_fuel(Some(FUEL));
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
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
        env.add_template_owned(NAME, plain_generation_blocks(source)).map_err(|e| failed(&e))?;
        Ok(ChatTemplate { env })
    }

    /// The text of `messages`; with `prompt`, what comes before the assistant's next turn is added. The error says
    /// what the template objects to.
    pub fn render(
        &self,
        messages: &[serde_json::Value],
        tools: Option<&serde_json::Value>,
        prompt: bool,
    ) -> Result<String, String> {
        let template = self.env.get_template(NAME).map_err(|e| e.to_string())?;
        let given = context! {
            messages => Value::from(Serde(messages)),
            tools => Value::from(Serde(tools)),
            documents => (),
            add_generation_prompt => prompt,
        };
        template.render(given).map_err(|e| format!("chat template: {}", reasons(&e)))
    }

    /// The text of `messages` and where the assistant speaks in it.
    ///
    /// An assistant turn begins where the text of the messages before it, with what prompts the assistant, parts
    /// from the whole, and ends where the text of the messages up to it ends; so a template that changes earlier
    /// messages when later ones come is an error.
    pub fn conversation(
        &self,
        messages: &[serde_json::Value],
        tools: Option<&serde_json::Value>,
    ) -> Result<Conversation, String> {
        let text = self.render(messages, tools, false)?;
        let mut assistant = Vec::new();
        for (i, message) in messages.iter().enumerate() {
            if message.get("role").and_then(|r| r.as_str()) != Some("assistant") {
                continue;
            }
            let end = match i + 1 == messages.len() {
                true => text.len(),
                false => {
                    let upto = self.render(&messages[..=i], tools, false)?;
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
            let start = match self.render(&messages[..i], tools, true) {
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
        let deep = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}";
        assert!(compile(deep).unwrap().render(&[], None, false).is_err());
    }
}
