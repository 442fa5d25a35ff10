//! The same review line by line, where there is no browser.

use std::io::{BufRead, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use super::Session;
use crate::data::cross::item::Written;
use crate::data::review::decisions::{Decision, Reason, Verdict, edited};
use crate::data::tasks::LETTERS;
use crate::error::{Error, Result};

const HELP: &str = "a accept · 1 incoherent · 2 one domain suffices · 3 wrong answer · e edit · u undo · n next · p previous · q quit";

/// How often a signal is looked for while nothing is typed.
const LOOK: Duration = Duration::from_millis(100);

/// What is typed, read on a thread of its own: a signal does not end the reading of a line.
pub(super) struct Typed<'a> {
    lines: Receiver<std::io::Result<String>>,
    stop: &'a AtomicBool,
}

impl Typed<'_> {
    /// The lines of `input`, until `stop` is set.
    pub fn of(input: impl BufRead + Send + 'static, stop: &AtomicBool) -> Typed<'_> {
        let (send, lines) = sync_channel(0);
        std::thread::spawn(move || input.lines().try_for_each(|line| send.send(line)));
        Typed { lines, stop }
    }

    /// A line without the white space around it, or none at the end and when it is stopped.
    fn line(&self) -> Result<Option<String>> {
        while !self.stop.load(Ordering::Relaxed) {
            match self.lines.recv_timeout(LOOK) {
                Ok(line) => return Ok(Some(line.map_err(Error::io("the terminal"))?.trim().to_string())),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        Ok(None)
    }
}

/// Shows items on `output` and takes a line of `input` for each, until it ends or says `q`.
pub(super) fn run(session: &mut Session, input: &Typed, mut output: impl Write) -> Result<()> {
    let mut n = undecided(session, 0).unwrap_or(0);
    let mut shown = None;
    loop {
        if shown != Some(n) {
            show(session, n, &mut output).map_err(Error::io("the terminal"))?;
            shown = Some(n);
        }
        let Some(line) = ask(input, &mut output, "> ")? else { return Ok(()) };
        let at = session.asked[n];
        let verdict = match line.as_str() {
            "a" => Verdict::Accept,
            "1" | "2" | "3" => {
                Verdict::Reject { reason: Reason::ALL[usize::from(line.as_bytes()[0] - b'1')] }
            }
            "u" => Verdict::Undo,
            "e" => match edit(&text(session, at), input, &mut output)? {
                Some(new) => {
                    Verdict::Edit { question: new.question, choices: new.choices, answer: new.answer }
                }
                None => return Ok(()),
            },
            "n" => {
                n = (n + 1) % session.asked.len();
                continue;
            }
            "p" => {
                n = (n + session.asked.len() - 1) % session.asked.len();
                continue;
            }
            "q" => return Ok(()),
            _ => {
                say(&mut output, HELP)?;
                continue;
            }
        };
        let item = &session.items[at];
        let undone = verdict == Verdict::Undo;
        let decision = Decision { item: item.id.clone(), sha256: item.written.sha256(), verdict };
        match session.decide(&decision)? {
            Err(why) => say(&mut output, &format!("not saved: {why}"))?,
            Ok(()) if undone => shown = None,
            Ok(()) => match undecided(session, n) {
                Some(next) => n = next,
                None => {
                    say(&mut output, "all are decided; p and n look at them again, q quits")?;
                }
            },
        }
    }
}

/// The first item that is not decided, from number `from` on and round.
fn undecided(session: &Session, from: usize) -> Option<usize> {
    let count = session.asked.len();
    (0..count).map(|n| (from + n) % count).find(|&n| session.verdict(session.asked[n]).is_none())
}

/// The item's text as it now reads.
fn text(session: &Session, at: usize) -> Written {
    session.verdict(at).and_then(edited).unwrap_or_else(|| session.items[at].written.clone())
}

fn show(session: &Session, n: usize, output: &mut impl Write) -> std::io::Result<()> {
    let at = session.asked[n];
    let item = &session.items[at];
    let state = match session.verdict(at) {
        None | Some(Verdict::Undo) => "undecided",
        Some(Verdict::Accept) => "accepted",
        Some(Verdict::Edit { .. }) => "edited",
        Some(Verdict::Reject { reason }) => reason.label(),
    };
    writeln!(
        output,
        "\n── {} of {} · {} decided · {} · {state}",
        n + 1,
        session.asked.len(),
        session.decided(),
        plain(&item.id)
    )?;
    for (source, knowledge) in item.sources.iter().zip(&item.knowledge) {
        writeln!(output, "\n{}: {}", plain(&source.domain), plain(&source.question))?;
        options(&source.choices, source.answer, output)?;
        writeln!(output, "   knowledge: {}", plain(knowledge))?;
    }
    let written = text(session, at);
    writeln!(output, "\n{}\n", plain(&written.question))?;
    options(&written.choices, written.answer, output)?;
    if let Some(why) = &item.explanation {
        writeln!(output, "   because: {}", plain(why))?;
    }
    writeln!(output, "\n{HELP}")
}

fn options(choices: &[String; 4], right: usize, output: &mut impl Write) -> std::io::Result<()> {
    for (n, (letter, choice)) in LETTERS.iter().zip(choices).enumerate() {
        let mark = if n == right { '*' } else { ' ' };
        writeln!(output, " {mark} {letter}. {}", plain(choice))?;
    }
    Ok(())
}

/// Text of a model or a file without what a terminal would take for a command.
fn plain(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || *c == '\n').collect()
}

/// A changed text, line by line; an empty line keeps what was. None when the input ends.
fn edit(written: &Written, input: &Typed, output: &mut impl Write) -> Result<Option<Written>> {
    let mut new = written.clone();
    say(output, "an empty line keeps what is there")?;
    for (name, field) in std::iter::once("question")
        .chain(LETTERS)
        .zip(std::iter::once(&mut new.question).chain(&mut new.choices))
    {
        match ask(input, output, &format!("{name}: "))? {
            None => return Ok(None),
            Some(line) if line.is_empty() => {}
            Some(line) => *field = line,
        }
    }
    loop {
        match ask(input, output, &format!("right option [{}]: ", LETTERS[new.answer]))?.as_deref() {
            None => return Ok(None),
            Some("") => return Ok(Some(new)),
            Some(typed) => match LETTERS.iter().position(|l| l.eq_ignore_ascii_case(typed)) {
                Some(n) => return Ok(Some(Written { answer: n, ..new })),
                None => say(output, "A, B, C or D")?,
            },
        }
    }
}

/// The line that is typed after `prompt`, or none when the input ends.
fn ask(input: &Typed, output: &mut impl Write, prompt: &str) -> Result<Option<String>> {
    write!(output, "{prompt}").and_then(|()| output.flush()).map_err(Error::io("the terminal"))?;
    let line = input.line()?;
    if line.is_none() {
        // What is said next does not stand behind the prompt.
        say(output, "")?;
    }
    Ok(line)
}

fn say(output: &mut impl Write, text: &str) -> Result<()> {
    writeln!(output, "{text}").map_err(Error::io("the terminal"))
}

#[cfg(test)]
mod tests {
    use std::io::{BufReader, Cursor};

    use super::*;
    use crate::data::cross::item::Item;
    use crate::data::review::decisions::Decisions;
    use crate::data::review::decisions::tests::items;

    fn typed(lines: &str, change: impl FnOnce(&mut Vec<Item>)) -> (Vec<Option<Verdict>>, String) {
        let dir = tempfile::tempdir().unwrap();
        let mut items = items(4);
        change(&mut items);
        let decisions = Decisions::open(dir.path(), "ann", &items).unwrap();
        let mut session = Session { items: &items, asked: &[0, 1, 3], reviewer: "ann", decisions };
        let mut output = Vec::new();
        let stop = AtomicBool::new(false);
        let input = Typed::of(Cursor::new(lines.to_string()), &stop);
        run(&mut session, &input, &mut output).unwrap();
        let verdicts = (0..4).map(|at| session.verdict(at).cloned()).collect();
        (verdicts, String::from_utf8(output).unwrap())
    }

    #[test]
    fn lines_decide() {
        let reject = |reason| Some(Verdict::Reject { reason });
        let (verdicts, output) = typed("what?\na\n3\n2\n", |_| {});
        let expected =
            [Some(Verdict::Accept), reject(Reason::WrongAnswer), None, reject(Reason::SingleDomain)];
        assert_eq!(verdicts, expected);
        assert!(output.contains("law: What is fact 0 of law?"), "{output}");
        assert!(output.contains("all are decided"), "{output}");
        assert_eq!(output.matches(HELP).count(), 4);
        let (verdicts, _) = typed("a\np\nu\nn\n1\nq\na\n", |_| {});
        assert_eq!(verdicts, [None, reject(Reason::Incoherent), None, None]);
    }

    #[test]
    fn edits_keep_what_is_left_empty_and_must_be_questions() {
        let (verdicts, output) = typed("e\nNew?\n\nzwei\n\n\nE\nc\ne\n\n\n\nthree 1\nthree 1\n\n", |_| {});
        let choices = ["one 0", "zwei", "three 0", "four 0"].map(String::from);
        let edit = Verdict::Edit { question: "New?".into(), choices, answer: 2 };
        assert_eq!(verdicts, [Some(edit), None, None, None]);
        assert!(
            output.contains("A, B, C or D") && output.contains("not saved: the option \"three 1\""),
            "{output}"
        );
        let (verdicts, _) = typed("e\nhalf", |_| {});
        assert!(verdicts.iter().all(Option::is_none));
    }

    #[test]
    fn a_signal_ends_it_while_nothing_is_typed() {
        let dir = tempfile::tempdir().unwrap();
        let items = items(1);
        let decisions = Decisions::open(dir.path(), "ann", &items).unwrap();
        let mut session = Session { items: &items, asked: &[0], reviewer: "ann", decisions };
        let (silent, _open) = std::io::pipe().unwrap();
        let stop = AtomicBool::new(false);
        let input = Typed::of(BufReader::new(silent), &stop);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                stop.store(true, Ordering::Relaxed);
            });
            run(&mut session, &input, std::io::sink()).unwrap();
        });
    }

    #[test]
    fn what_a_model_wrote_moves_no_cursor() {
        let (_, output) = typed("", |items| items[0].written.question = "a\u{1b}[2Jb\nc\u{7}".into());
        assert!(output.contains("a[2Jb\nc") && !output.contains('\u{1b}'), "{output}");
        let (_, output) = typed("", |items| items[0].id = "law\u{1b}]0;x\u{7}/0".into());
        assert!(output.contains("law]0;x/0") && !output.contains(['\u{1b}', '\u{7}']), "{output}");
    }
}
