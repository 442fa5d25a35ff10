//! Training data: files of text, of prompts with completions, or of conversations, as token sequences with a mask.

use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::chat::ChatTemplate;
use super::date;
use super::lines;
use super::tokenizer::Tokenizer;
use crate::checkpoint::json;
use crate::error::{Error, Result};

/// A token sequence that is positioned from 0 and that no other sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The tokens.
    pub ids: Vec<u32>,
    /// For each token, whether the loss asks for it (given all tokens before it); never for the first.
    pub supervised: Vec<bool>,
}

impl Document {
    /// `ids` with the loss on those from `from` on, the very first never.
    pub fn supervised_from(ids: Vec<u32>, from: usize) -> Document {
        let supervised = (0..ids.len()).map(|i| i >= from.max(1)).collect();
        Document { ids, supervised }
    }

    /// How many tokens the loss asks for.
    pub fn targets(&self) -> usize {
        self.supervised.iter().filter(|&&s| s).count()
    }
}

/// What training data files hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrainingData {
    /// In the files' order; each has at least one supervised token and at most `seq` tokens.
    pub documents: Vec<Document>,
    /// What was left out because it was bad, a reason with file and line each; empty unless leaving out was allowed.
    pub skipped: Vec<String>,
}

/// One training example, not tokenised yet.
enum Example {
    Text(String),
    Completion { prompt: String, completion: String },
    Messages { messages: Vec<Value>, tools: Option<Value> },
}

/// How examples become documents.
struct Cutter<'a> {
    tokenizer: &'a Tokenizer,
    chat: Option<ChatTemplate>,
    seq: usize,
}

/// Reads `files`: JSON lines (`.jsonl`, `.ndjson`, `.json`) with `text`, or `prompt` and `completion`, or `messages`;
/// any other name is plain text, documents parted by `<|endoftext|>` or, where that does not occur, blank lines.
///
/// Text is cut into pieces of at most `seq` tokens, BOS on the first, EOS on the last; everything else is cut on the
/// right. A line that is bad, or of which the cut leaves nothing to learn, is an error with file and line, or is left
/// out with `skip_bad`. No document at all is an error.
pub fn load(files: &[PathBuf], tokenizer: &Tokenizer, seq: usize, skip_bad: bool) -> Result<TrainingData> {
    if seq < 2 {
        return Err(Error::Usage(format!(
            "a sequence of {seq} tokens predicts nothing, expected at least 2"
        )));
    }
    let mut data = TrainingData::default();
    for path in files {
        load_file(&mut data, path, tokenizer, seq, skip_bad)?;
    }
    if data.documents.is_empty() {
        let names = files.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(", ");
        let why = match data.skipped.as_slice() {
            [] => "no training data: no line or document in it".to_string(),
            [first, ..] => {
                format!("no training data: all {} lines are bad, first {first}", data.skipped.len())
            }
        };
        return Err(Error::file(names, why));
    }
    Ok(data)
}

fn load_file(
    data: &mut TrainingData,
    path: &Path,
    tokenizer: &Tokenizer,
    seq: usize,
    skip_bad: bool,
) -> Result<()> {
    let text = lines::read_text(path)?;
    let examples: Vec<(usize, Result<Example, String>)> = if lines::is_jsonl(path) {
        lines::numbered(&text).map(|(number, line)| (number, lines::object(line).and_then(example))).collect()
    } else {
        let places = lines::plain_documents(&text);
        let texts = places.iter().map(|r| Ok(Example::Text(text[r.clone()].to_string())));
        lines::lines_of(&text, places.iter().map(|r| r.start)).zip(texts).collect()
    };
    let chats = examples.iter().any(|(_, e)| matches!(e, Ok(Example::Messages { .. })));
    let chat = match chats {
        true => {
            let (file, source) = tokenizer.chat_source()?;
            Some(ChatTemplate::compile(file, source, tokenizer.special_names(), date::now())?)
        }
        false => None,
    };
    let others = examples.iter().any(|(_, e)| matches!(e, Ok(Example::Text(_) | Example::Completion { .. })));
    if others {
        tokenizer.eos()?;
    }
    let cutter = Cutter { tokenizer, chat, seq };
    let cut: Vec<(usize, Result<Vec<Document>, String>)> = examples
        .into_par_iter()
        .map(|(number, example)| (number, example.and_then(|e| cutter.documents(&e))))
        .collect();
    for (number, documents) in cut {
        match documents {
            Ok(documents) => data.documents.extend(documents),
            Err(why) if skip_bad => data.skipped.push(format!("{}: line {number}: {why}", path.display())),
            Err(why) => {
                return Err(Error::file(
                    path,
                    format!("line {number}: {why} (--skip-bad leaves such lines out)"),
                ));
            }
        }
    }
    Ok(())
}

/// The example that a line's object is.
fn example(map: Map<String, Value>) -> Result<Example, String> {
    let kinds = [map.contains_key("text"), map.contains_key("completion"), map.contains_key("messages")];
    match kinds {
        [true, false, false] => Ok(Example::Text(lines::string(&map, "text")?)),
        [false, true, false] => Ok(Example::Completion {
            prompt: lines::string(&map, "prompt")?,
            completion: lines::string(&map, "completion")?,
        }),
        [false, false, true] => messages(map),
        [false, false, false] => {
            let keys = map.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            Err(format!("has the keys {keys}; expected text, or prompt and completion, or messages")
                .replace("the keys ;", "no keys;"))
        }
        _ => Err("has more than one of text, completion and messages".into()),
    }
}

fn messages(mut map: Map<String, Value>) -> Result<Example, String> {
    let messages = match map.remove("messages") {
        Some(Value::Array(messages)) => messages,
        other => {
            return Err(format!("messages is {}, expected an array", json::kind(&other.unwrap_or_default())));
        }
    };
    for (i, message) in messages.iter().enumerate() {
        if !message.get("role").is_some_and(Value::is_string) {
            return Err(format!("message {i} has no role, expected an object with role and content"));
        }
    }
    if !messages.iter().any(|m| m.get("role").and_then(Value::as_str) == Some("assistant")) {
        return Err("no message has the role assistant, so there is nothing to learn".into());
    }
    Ok(Example::Messages { messages, tools: map.remove("tools") })
}

impl Cutter<'_> {
    fn documents(&self, example: &Example) -> Result<Vec<Document>, String> {
        match example {
            Example::Text(text) => self.text(text),
            Example::Completion { prompt, completion } => Ok(vec![self.completion(prompt, completion)?]),
            Example::Messages { messages, tools } => Ok(vec![self.messages(messages, tools.as_ref())?]),
        }
    }

    /// Pieces of at most `seq` tokens. A last piece of one token has nothing before it to predict it from and is
    /// left away.
    fn text(&self, text: &str) -> Result<Vec<Document>, String> {
        if text.is_empty() {
            return Err("text is empty".into());
        }
        let mut ids = self.tokenizer.encode(text).map_err(|e| e.to_string())?;
        ids.push(self.tokenizer.eos().map_err(|e| e.to_string())?);
        let pieces = ids.chunks(self.seq).filter(|piece| piece.len() > 1);
        Ok(pieces.map(|piece| Document::supervised_from(piece.to_vec(), 1)).collect())
    }

    fn completion(&self, prompt: &str, completion: &str) -> Result<Document, String> {
        let pair = self.tokenizer.encode_pair(prompt, completion).map_err(|e| e.to_string())?;
        let from = pair.prompt.len();
        if pair.rest().is_empty() {
            return Err("the completion adds no token to the prompt".into());
        }
        if from >= self.seq {
            return Err(format!(
                "the prompt has {from} tokens and would leave nothing of the completion in a sequence of {}",
                self.seq
            ));
        }
        let mut ids = pair.whole;
        ids.push(self.tokenizer.eos().map_err(|e| e.to_string())?);
        ids.truncate(self.seq);
        Ok(Document::supervised_from(ids, from))
    }

    /// The rendered conversation, its own special tokens the only ones, as transformers tokenises it.
    fn messages(&self, messages: &[Value], tools: Option<&Value>) -> Result<Document, String> {
        let chat = self.chat.as_ref().ok_or("no chat template")?;
        let talk = chat.conversation(messages, tools)?;
        let tokens = self.tokenizer.encode_offsets(&talk.text).map_err(|e| e.to_string())?;
        // A token belongs to the turn that it begins in.
        let begins_in_turn = |at: &Range<usize>| talk.assistant.iter().any(|turn| turn.contains(&at.start));
        let mut supervised: Vec<bool> =
            tokens.iter().enumerate().map(|(i, (_, at))| i > 0 && begins_in_turn(at)).collect();
        let mut ids: Vec<u32> = tokens.into_iter().map(|(id, _)| id).collect();
        let whole = supervised.iter().filter(|&&s| s).count();
        ids.truncate(self.seq);
        supervised.truncate(self.seq);
        let document = Document { ids, supervised };
        match (document.targets(), whole) {
            (0, 0) => Err("the assistant's turns have no tokens".into()),
            (0, _) => Err(format!("no assistant turn is left in a sequence of {} tokens", self.seq)),
            _ => Ok(document),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::data::fixture;

    const CHAT: (&str, &str) = (
        "chat_template.jinja",
        "{{ bos_token }}{% for m in messages %} {{ m.role[0] | upper }} {{ m.content }} {{ eos_token }}{% endfor %}{% if add_generation_prompt %} A{% endif %}",
    );

    fn read(name: &str, text: &str, seq: usize, skip_bad: bool) -> Result<TrainingData> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        load(&[path], &fixture::tokenizer(true, &[CHAT]), seq, skip_bad)
    }

    fn doc(ids: &[u32], mask: &[u8]) -> Document {
        Document { ids: ids.to_vec(), supervised: mask.iter().map(|&m| m == 1).collect() }
    }

    #[test]
    fn text_is_cut_into_pieces_with_bos_first_and_eos_last() {
        let data = read("d.jsonl", "{\"text\": \"a b c d a b\"}\n", 3, false).unwrap();
        assert_eq!(
            data.documents,
            [doc(&[1, 3, 4], &[0, 1, 1]), doc(&[5, 6, 3], &[0, 1, 1]), doc(&[4, 2], &[0, 1])]
        );
        // The end would stand alone in the second piece.
        let data = read("d.jsonl", "{\"text\": \"a b\"}\n", 3, false).unwrap();
        assert_eq!(data.documents, [doc(&[1, 3, 4], &[0, 1, 1])]);
        let data = read("d.txt", "a b\n\nc\n", 8, false).unwrap();
        assert_eq!(data.documents, [doc(&[1, 3, 4, 2], &[0, 1, 1, 1]), doc(&[1, 5, 2], &[0, 1, 1])]);
    }

    #[test]
    fn completions_are_supervised_and_cut_on_the_right() {
        let line = "{\"prompt\": \"a b \", \"completion\": \"c d\", \"source\": \"x\"}";
        assert_eq!(
            read("d.jsonl", line, 9, false).unwrap().documents,
            [doc(&[1, 3, 4, 5, 6, 2], &[0, 0, 0, 1, 1, 1])]
        );
        assert_eq!(read("d.jsonl", line, 4, false).unwrap().documents, [doc(&[1, 3, 4, 5], &[0, 0, 0, 1])]);
        let err = read("d.jsonl", line, 3, false).unwrap_err().to_string();
        assert!(err.contains("line 1: the prompt has 3 tokens"), "{err}");
        let two = format!("{line}\n{{\"prompt\": \"a\", \"completion\": \" b\"}}");
        let data = read("d.jsonl", &two, 3, true).unwrap();
        assert_eq!(data.documents, [doc(&[1, 3, 4], &[0, 0, 1])]);
        assert_eq!(data.skipped.len(), 1);
        let err =
            read("d.jsonl", "{\"prompt\": \"a\", \"completion\": \"\"}", 9, false).unwrap_err().to_string();
        assert!(err.contains("adds no token"), "{err}");
        let none = read("d.jsonl", "{\"prompt\": \"\", \"completion\": \"c\"}", 9, false).unwrap();
        assert_eq!(none.documents, [doc(&[1, 5, 2], &[0, 1, 1])]);
    }

    #[test]
    fn conversations_are_supervised_on_the_assistants_turns() {
        let line = r#"{"messages": [{"role": "bob", "content": "a b"}, {"role": "assistant", "content": "c"}, {"role": "bob", "content": "d"}, {"role": "assistant", "content": "d d"}]}"#;
        let ids = [1, 8, 3, 4, 2, 7, 5, 2, 8, 6, 2, 7, 6, 6, 2];
        let mask = [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1];
        assert_eq!(read("d.jsonl", line, 99, false).unwrap().documents, [doc(&ids, &mask)]);
        assert_eq!(read("d.jsonl", line, 7, false).unwrap().documents, [doc(&ids[..7], &mask[..7])]);
        let err = read("d.jsonl", line, 6, false).unwrap_err().to_string();
        assert!(err.contains("no assistant turn is left in a sequence of 6"), "{err}");
        let err =
            read("d.jsonl", r#"{"messages": [{"role": "user", "content": "a"}]}"#, 9, false).unwrap_err();
        assert!(err.to_string().contains("nothing to learn"), "{err}");

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.jsonl");
        std::fs::write(&path, line).unwrap();
        let err = load(&[path], &fixture::tokenizer(true, &[]), 9, true).unwrap_err().to_string();
        assert!(err.contains("no chat template"), "{err}");
    }

    #[test]
    fn bad_lines_name_file_and_line() {
        let text = "{\"text\": \"a\"}\n\nnonsense\n{\"text\": 3}\n{\"prompt\": \"a\"}\n{\"text\": \"a\", \"messages\": []}\n{}\n[]\n{\"text\": \"\"}\n";
        let err = read("d.jsonl", text, 9, false).unwrap_err().to_string();
        assert!(err.contains("d.jsonl: line 3: is no JSON object") && err.contains("--skip-bad"), "{err}");
        let data = read("d.jsonl", text, 9, true).unwrap();
        assert_eq!(data.documents.len(), 1);
        let lines: Vec<&str> = data.skipped.iter().map(|s| s.split(": ").nth(1).unwrap()).collect();
        assert_eq!(lines, ["line 3", "line 4", "line 5", "line 6", "line 7", "line 8", "line 9"]);
        assert!(data.skipped[2].contains("has the keys prompt; expected"), "{}", data.skipped[2]);
        assert!(data.skipped[4].contains("has no keys; expected"), "{}", data.skipped[4]);

        for (name, text) in [("d.jsonl", ""), ("d.jsonl", "\n \n"), ("d.txt", ""), ("d.jsonl", "x")] {
            let err = read(name, text, 9, true).unwrap_err().to_string();
            assert!(err.contains("no training data"), "{err}");
        }
        assert!(read("d.jsonl", "{\"text\": \"a\"}", 1, false).is_err());
    }

    #[test]
    fn real_stories() {
        let Some((dir, tokenizer)) = fixture::stories() else { return };
        let file = dir.with_file_name("tinystories").join("tinystories_sample_cs336.txt");
        let data = load(&[file], &tokenizer, 512, false).unwrap();
        let bos = data.documents.iter().filter(|d| d.ids[0] == 1).count();
        assert_eq!(bos, 5);
        assert_eq!(data.documents.iter().filter(|d| d.ids.last() == Some(&2)).count(), 5);
        assert!(data.documents.iter().all(|d| d.ids.len() <= 512 && d.targets() + 1 == d.ids.len()));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_file_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), jsonl: bool) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join(if jsonl { "d.jsonl" } else { "d.txt" });
            std::fs::write(&path, bytes).unwrap();
            let tokenizer = fixture::tokenizer(true, &[CHAT]);
            if let Ok(data) = load(&[path], &tokenizer, 16, true) {
                prop_assert!(data.documents.iter().all(|d| d.targets() > 0 && d.ids.len() <= 16 && !d.supervised[0]));
            }
        }
    }
}
