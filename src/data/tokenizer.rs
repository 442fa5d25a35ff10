//! The model's tokenizer: text to ids and back, with its own beginning and end of sequence.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use super::foreign;
use crate::checkpoint::json;
use crate::error::{Error, Result};

/// A model folder's `tokenizer.json` with what `tokenizer_config.json`, `config.json` and `generation_config.json`
/// say about its special tokens. Every id that it gives is below V.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    /// V.
    vocab: usize,
    /// What the post-processor puts before a text, the BOS never twice.
    prefix: Vec<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    stops: Vec<u32>,
    special_names: Vec<(String, String)>,
    chat: Option<(PathBuf, String)>,
}

/// A prompt, and the prompt and what follows it tokenised together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Ids of the prompt alone, BOS first where the tokenizer puts one.
    pub prompt: Vec<u32>,
    /// Ids of the whole, parted at the prompt's count; tokenizers may join what meets there.
    pub whole: Vec<u32>,
}

impl Pair {
    /// What the whole has after as many tokens as the prompt has.
    pub fn rest(&self) -> &[u32] {
        &self.whole[self.prompt.len().min(self.whole.len())..]
    }
}

impl Tokenizer {
    /// Reads the tokenizer of the model folder `dir`, whose vocabulary has `vocab` (V) rows.
    ///
    /// An error if a file is missing or malformed, or if the tokenizer has an id that is not below V.
    pub fn load(dir: &Path, vocab: usize) -> Result<Tokenizer> {
        let path = dir.join("tokenizer.json");
        let bytes = json::read_bounded(&path)?;
        serde_json::from_slice::<IgnoredAny>(&bytes)
            .map_err(|e| Error::file(&path, format!("is not the JSON expected: {e}")))?;
        let read = || -> tokenizers::Result<_> {
            let mut inner = tokenizers::Tokenizer::from_bytes(&bytes)?;
            // Training and scoring cut by their own rules, and never pad.
            inner.with_truncation(None)?;
            inner.with_padding(None);
            let size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
            Ok((inner, size))
        };
        let (inner, size) = called(foreign::catch(read))
            .map_err(|e| Error::file(&path, format!("is not a tokenizer that can be read: {e}")))?;
        if size > vocab {
            let why = format!("has ids up to {}, expected below the model's vocab_size of {vocab}", size - 1);
            return Err(Error::file(&path, format!("{why}: it belongs to another model")));
        }

        let config_path = dir.join("tokenizer_config.json");
        let config = optional_object(&config_path)?;
        let mut special_names = special_tokens(&config_path, &config)?;
        let named = |names: &[(String, String)], key: &str| -> Result<Option<u32>> {
            let Some((_, text)) = names.iter().find(|(k, _)| k == key) else { return Ok(None) };
            inner.token_to_id(text).map(Some).ok_or_else(|| {
                Error::file(&config_path, format!("{key} is {text:?}, which tokenizer.json does not have"))
            })
        };
        let model = |key: &str| -> Result<Vec<u32>> {
            let mut ids = Vec::new();
            for file in ["config.json", "generation_config.json"] {
                let path = dir.join(file);
                ids.extend(token_ids(&path, optional_object(&path)?.get(key), key, vocab)?);
            }
            Ok(ids)
        };
        let bos = named(&special_names, "bos_token")?.or(model("bos_token_id")?.first().copied());
        let model_eos = model("eos_token_id")?;
        let eos = named(&special_names, "eos_token")?.or(model_eos.first().copied());
        let mut stops: Vec<u32> = eos.into_iter().chain(model_eos).collect();
        stops.sort_unstable();
        stops.dedup();
        // Templates name the tokens by their text, whichever file they come from.
        for (key, id) in [("bos_token", bos), ("eos_token", eos)] {
            if let (false, Some(text)) =
                (special_names.iter().any(|(k, _)| k == key), id.and_then(|id| inner.id_to_token(id)))
            {
                special_names.push((key.into(), text));
            }
        }

        let chat = chat_template(dir, &config_path, &config)?;
        let mut tokenizer =
            Tokenizer { inner, path, vocab, prefix: Vec::new(), bos, eos, stops, special_names, chat };
        tokenizer.prefix = tokenizer.find_prefix()?;
        Ok(tokenizer)
    }

    /// The ids that the post-processor puts before a text: those before "a" where "a" is tokenised with special
    /// tokens, a BOS that stands there twice taken once.
    fn find_prefix(&self) -> Result<Vec<u32>> {
        let body = self.encode_plain("a")?;
        let whole = self.encoded(|| self.inner.encode_fast("a", true))?;
        let whole = whole.get_ids();
        let at = match body.len() {
            0 => whole.iter().take_while(|&&id| Some(id) == self.bos).count(),
            n => whole.windows(n).position(|w| w == body).ok_or_else(|| {
                self.failed("the post-processor changes the ids of a text, expected it to add to them")
            })?,
        };
        let mut prefix = whole[..at].to_vec();
        prefix.dedup_by(|a, b| a == b && Some(*a) == self.bos);
        Ok(prefix)
    }

    /// Ids of `text` as the model's tokenizer gives them: what its post-processor puts first (BOS, or nothing), then
    /// the text's own. A text that itself begins with the BOS does not get a second one; nothing is put at the end.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let body = self.encode_plain(text)?;
        let doubled = !body.is_empty()
            && self.bos.is_some()
            && body.first().copied() == self.bos
            && self.prefix.last().copied() == self.bos;
        let mut ids = self.prefix.clone();
        ids.extend_from_slice(&body[usize::from(doubled)..]);
        Ok(ids)
    }

    /// Ids of `text` alone; special tokens that it spells out are recognised, none is added.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.encoded(|| self.inner.encode_fast(text, false))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids of `text` alone, each with the byte range of the text that it stands for.
    pub fn encode_offsets(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = self.encoded(|| self.inner.encode(text, false))?;
        let ranges = encoding.get_offsets().iter().map(|&(from, to)| from..to);
        Ok(encoding.get_ids().iter().copied().zip(ranges).collect())
    }

    /// `prompt` and `rest` tokenised together, parted at the token count of the prompt alone; see
    /// [`Tokenizer::encode_prompt`].
    pub fn encode_pair(&self, prompt: &str, rest: &str) -> Result<Pair> {
        Ok(Pair { prompt: self.encode_prompt(prompt)?, whole: self.encode(&format!("{prompt}{rest}"))? })
    }

    /// Ids of `prompt` as the beginning of something longer: white space at its end counts as what follows it,
    /// because tokenizers join it to the next word (as lm-evaluation-harness does).
    pub fn encode_prompt(&self, prompt: &str) -> Result<Vec<u32>> {
        self.encode(prompt.trim_end())
    }

    /// The text of `ids`, special tokens left out if `skip_special`.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        called(foreign::catch(|| self.inner.decode(ids, skip_special))).map_err(|e| self.failed(&e))
    }

    /// The encoding that `encode` gives, its ids checked: a post-processor may add any.
    fn encoded(
        &self,
        encode: impl FnOnce() -> tokenizers::Result<tokenizers::Encoding>,
    ) -> Result<tokenizers::Encoding> {
        let encoding = called(foreign::catch(encode)).map_err(|e| self.failed(&e))?;
        match encoding.get_ids().iter().find(|&&id| id as usize >= self.vocab) {
            Some(id) => Err(self.failed(&format!("gives id {id}, the model's vocab_size is {}", self.vocab))),
            None => Ok(encoding),
        }
    }

    /// The beginning-of-sequence id, whether or not the post-processor uses it.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The end-of-sequence id that training appends: the tokenizer's own, else the first of the model's.
    pub fn eos(&self) -> Result<u32> {
        self.eos.ok_or_else(|| {
            let why = "no end-of-sequence token: neither tokenizer_config.json (eos_token) nor config.json or \
                       generation_config.json (eos_token_id) names one";
            self.failed(why)
        })
    }

    /// The ids that end a generated text, ascending.
    pub fn stops(&self) -> &[u32] {
        &self.stops
    }

    /// The chat template's file and source; an error that says where one was looked for.
    pub fn chat_source(&self) -> Result<(&Path, &str)> {
        self.chat.as_ref().map(|(path, source)| (path.as_path(), source.as_str())).ok_or_else(|| {
            let dir = self.path.parent().unwrap_or(Path::new("."));
            let why = "no chat template: data with `messages` needs chat_template.jinja or a chat_template in \
                       tokenizer_config.json; put one there or use `prompt` and `completion`";
            Error::file(dir, why)
        })
    }

    /// Names and texts of the special tokens, for templates: `bos_token`, `eos_token`, `unk_token`, `pad_token`.
    pub fn special_names(&self) -> &[(String, String)] {
        &self.special_names
    }

    fn failed(&self, why: &str) -> Error {
        Error::file(&self.path, why)
    }
}

/// What a call of the library gave, or what it objects to.
fn called<T>(result: Result<tokenizers::Result<T>, String>) -> Result<T, String> {
    result?.map_err(|e| e.to_string())
}

/// The object in the file at `path`, empty if there is no such file.
fn optional_object(path: &Path) -> Result<Map<String, Value>> {
    if path.exists() { json::read_object(path) } else { Ok(Map::new()) }
}

/// The special tokens that `config` names, as text or as an object with `content`.
fn special_tokens(path: &Path, config: &Map<String, Value>) -> Result<Vec<(String, String)>> {
    let mut out = Vec::new();
    for key in ["bos_token", "eos_token", "unk_token", "pad_token"] {
        let value = config.get(key).unwrap_or(&Value::Null);
        let text = match value {
            Value::Null => continue,
            Value::Object(token) => token.get("content").unwrap_or(value),
            other => other,
        };
        let text = text.as_str().ok_or_else(|| {
            Error::file(
                path,
                format!("{key} is {}, expected a string or an object with content", json::kind(text)),
            )
        })?;
        out.push((key.to_string(), text.to_string()));
    }
    Ok(out)
}

/// A token id, several, or none.
fn token_ids(path: &Path, value: Option<&Value>, key: &str, vocab: usize) -> Result<Vec<u32>> {
    let one = |v: &Value| {
        v.as_u64().filter(|&id| id < vocab as u64).and_then(|id| u32::try_from(id).ok()).ok_or_else(|| {
            Error::file(path, format!("{key} is {}, expected an id below {vocab}", json::kind(v)))
        })
    };
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(one).collect(),
        Some(id) => Ok(vec![one(id)?]),
    }
}

/// The chat template: `chat_template.jinja`, else `chat_template` of `config`, where several have names the one that
/// is called `default`.
fn chat_template(
    dir: &Path,
    config_path: &Path,
    config: &Map<String, Value>,
) -> Result<Option<(PathBuf, String)>> {
    let file = dir.join("chat_template.jinja");
    if file.exists() {
        let text = String::from_utf8(json::read_bounded(&file)?)
            .map_err(|e| Error::file(&file, format!("is not UTF-8: {e}")))?;
        return Ok(Some((file, text)));
    }
    let source = match config.get("chat_template") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(named)) => named
            .iter()
            .find(|t| t.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|t| t.get("template")),
        other => other,
    };
    match source.and_then(Value::as_str) {
        Some(text) => Ok(Some((config_path.to_path_buf(), text.to_string()))),
        None => Err(Error::file(
            config_path,
            "chat_template is neither a string nor a list with a template named \"default\"",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::fixture;

    #[test]
    fn golden_prompt_of_a_real_model() {
        let Some((dir, t)) = fixture::stories() else { return };
        let golden: Value = json::typed(
            &dir,
            json::parse(&dir, &std::fs::read(dir.with_file_name("stories260K-hf-golden.json")).unwrap())
                .unwrap(),
        )
        .unwrap();
        let ids: Vec<u32> = serde_json::from_value(golden["ids"].clone()).unwrap();
        assert_eq!(t.encode(golden["prompt"].as_str().unwrap()).unwrap(), ids);
        let greedy: Vec<u32> = serde_json::from_value(golden["greedy_ids"].clone()).unwrap();
        assert_eq!(t.decode(&greedy, true).unwrap(), golden["greedy_text"].as_str().unwrap());
        assert_eq!((t.bos(), t.eos().unwrap(), t.stops()), (Some(1), 2, &[2][..]));
    }

    #[test]
    fn bos_stands_once_whoever_adds_it() {
        let with = fixture::tokenizer(true, &[]);
        assert_eq!(with.encode("a b").unwrap(), [1, 3, 4]);
        assert_eq!(with.encode("<s> a b").unwrap(), [1, 3, 4]);
        assert_eq!(with.encode("").unwrap(), [1]);
        assert_eq!(with.encode_plain("a b").unwrap(), [3, 4]);
        let without = fixture::tokenizer(false, &[]);
        assert_eq!(without.encode("a b").unwrap(), [3, 4]);
        assert_eq!(without.encode("<s> a b").unwrap(), [1, 3, 4]);
    }

    #[test]
    fn pairs_part_at_the_prompts_own_count() {
        let t = fixture::tokenizer(true, &[]);
        let pair = t.encode_pair("a b", " c").unwrap();
        assert_eq!((&pair.prompt[..], pair.rest()), (&[1, 3, 4][..], &[5][..]));
        assert_eq!(t.encode_pair("a b ", "c").unwrap(), pair);
        assert_eq!(t.encode_pair("", "c").unwrap(), Pair { prompt: vec![1], whole: vec![1, 5] });
        assert!(t.encode_pair("a", "b").unwrap().rest().is_empty());
    }

    #[test]
    fn a_larger_vocabulary_is_refused_by_both_numbers() {
        let dir = fixture::folder(true, &[]);
        let err = Tokenizer::load(dir.path(), 7).err().unwrap().to_string();
        assert!(err.contains("ids up to 10") && err.contains("vocab_size of 7"), "{err}");
        assert!(Tokenizer::load(dir.path(), 11).is_ok());
    }

    #[test]
    fn special_tokens_come_from_any_of_the_files() {
        let t = fixture::tokenizer(
            true,
            &[
                ("tokenizer_config.json", r#"{"eos_token": {"content": "</s>"}}"#),
                ("config.json", r#"{"bos_token_id": 1, "eos_token_id": [2, 5]}"#),
            ],
        );
        assert_eq!((t.bos(), t.eos().unwrap(), t.stops()), (Some(1), 2, &[2, 5][..]));
        assert!(t.special_names().contains(&("bos_token".into(), "<s>".into())));

        let dir = fixture::folder(true, &[("tokenizer_config.json", r#"{"eos_token": "<eos>"}"#)]);
        let err = Tokenizer::load(dir.path(), 11).err().unwrap().to_string();
        assert!(err.contains("\"<eos>\""), "{err}");
        let dir = fixture::folder(true, &[("config.json", r#"{"eos_token_id": 11}"#)]);
        let err = Tokenizer::load(dir.path(), 11).err().unwrap().to_string();
        assert!(err.contains("eos_token_id is 11, expected an id below 11"), "{err}");
    }

    #[test]
    fn a_missing_end_or_template_says_where_it_was_looked_for() {
        let t = fixture::tokenizer(true, &[("tokenizer_config.json", "{}")]);
        assert!(t.eos().unwrap_err().to_string().contains("generation_config.json"));
        assert!(t.chat_source().unwrap_err().to_string().contains("chat_template.jinja"));
        let t = fixture::tokenizer(
            true,
            &[(
                "tokenizer_config.json",
                r#"{"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}"#,
            )],
        );
        assert_eq!(t.chat_source().unwrap().1, "d");
    }

    #[test]
    fn damaged_tokenizers_are_errors_not_panics() {
        let whole = fixture::tokenizer_json(true);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        for cut in (0..whole.len()).step_by(97) {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert!(Tokenizer::load(dir.path(), 11).is_err());
        }
        std::fs::remove_file(&path).unwrap();
        assert!(Tokenizer::load(dir.path(), 11).is_err());
        std::fs::create_dir(&path).unwrap();
        assert!(Tokenizer::load(dir.path(), 11).is_err());
    }
}
