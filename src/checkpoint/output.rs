//! Output folders that appear whole or not at all.
//!
//! Work goes on in `OUT.partial` beside OUT. It holds a marker, a hidden file with the command's fingerprint, locked as
//! long as the run lives. The end is one rename; where an old output is replaced, one exchange of the two names, or, on
//! file systems without that, two renames by way of `OUT.old`. Whatever the moment of a kill, what was old or what is
//! new is whole, and the next start tidies up: flags in the folder with the marker say how far the end had come.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::place::{self, Found};
use super::provenance::PROVENANCE;
use crate::error::{Error, Result};

/// The locked file in `OUT.partial`.
const MARKER: &str = ".anabranch-partial";
/// Beside the marker: OUT and `OUT.partial` are about to be exchanged.
const EXCHANGE: &str = ".anabranch-exchange";
/// Beside the marker: OUT is about to become `OUT.old`, and `OUT.partial` OUT.
const BY_OLD: &str = ".anabranch-by-old";
const FORMAT: &str = "anabranch-partial/1";

/// What to do about what is already there.
#[derive(Clone, Copy, Debug, Default)]
pub struct OutputOptions {
    /// Replace an existing output that this program made, start afresh where there is a leftover (`--force`).
    pub force: bool,
    /// Go on from a leftover (`--resume`).
    pub resume: bool,
}

/// How a run starts.
#[derive(Debug)]
pub enum Begun {
    /// `--resume`, and OUT is there.
    Finished,
    /// There is work to do.
    Work(Output),
}

#[derive(Debug, Serialize, Deserialize)]
struct Marker {
    format: String,
    command: String,
    fingerprint: String,
}

/// An output folder being made. Dropped without [`Output::finish`], it is removed, unless [`Output::keep`] was called
/// or the run began from a leftover.
#[derive(Debug)]
pub struct Output {
    out: PathBuf,
    partial: PathBuf,
    /// Open and locked; the lock ends with the process, however that ends.
    _lock: File,
    resumed: bool,
    keep: bool,
    done: bool,
    force: bool,
    /// Folders above OUT that this run made, innermost first.
    parents: Vec<PathBuf>,
}

impl Output {
    /// Begins the output folder `out` of `command`, whose options that change the result have this `fingerprint`.
    ///
    /// It is an error if OUT is there (but for an empty folder, and but for `force` on a folder that this program made),
    /// if there is a leftover and neither `resume` nor `force` is given, if `resume` is given and the leftover is of
    /// another command, if another run is writing there, and for the paths that [`place::resolve`] refuses.
    pub fn begin(out: &Path, command: &str, fingerprint: &str, options: OutputOptions) -> Result<Begun> {
        let out = place::resolve(out)?;
        let partial = place::beside(&out, ".partial");
        repair(&out, &partial)?;
        if standing(&out, &partial, options)? == Standing::Finished {
            return Ok(Begun::Finished);
        }
        let parents = place::make_parents(&out)?;
        let undo = |e| {
            // Only if it is empty, and the folders above it if they then are.
            if std::fs::remove_dir(&partial).is_ok() {
                remove_parents(&parents);
            }
            e
        };
        let (lock, old) = claim(&out, &partial).map_err(undo)?;
        let resumed = old.is_some() && options.resume;
        match &old {
            Some(m) if options.resume && m.fingerprint != fingerprint => {
                return Err(Error::Usage(format!(
                    "{} is unfinished work of another command ({} with other options or inputs): give those to go on, or --force without --resume to start afresh",
                    partial.display(),
                    m.command
                )));
            }
            Some(_) if !options.resume && !options.force => {
                return Err(unfinished(&partial));
            }
            _ => {}
        }
        let mut output = Output {
            out,
            partial,
            _lock: lock,
            resumed,
            keep: resumed,
            done: false,
            force: options.force,
            parents,
        };
        if !resumed {
            place::clear(&output.partial, &[MARKER])?;
            output.mark(command, fingerprint)?;
        }
        Ok(Begun::Work(output))
    }

    /// As [`Output::begin`], for a command that has nothing to go on from: a leftover that it resumes is cleared, so that
    /// in the end there is what this run wrote and nothing else.
    pub fn begin_anew(out: &Path, command: &str, fingerprint: &str, options: OutputOptions) -> Result<Begun> {
        let mut begun = Output::begin(out, command, fingerprint, options)?;
        if let Begun::Work(output) = &mut begun
            && output.resumed
        {
            place::clear(&output.partial, &[MARKER])?;
            (output.resumed, output.keep) = (false, false);
        }
        Ok(begun)
    }

    /// Whether there is work that was to become `out` and was not finished.
    pub fn is_unfinished(out: &Path) -> bool {
        is_leftover(&place::beside(out, ".partial"))
    }

    /// What [`Output::begin`] would find at `out`, with its errors, and without making anything.
    pub fn look_ahead(out: &Path, options: OutputOptions) -> Result<Standing> {
        let out = place::resolve(out)?;
        let partial = place::beside(&out, ".partial");
        let found = standing(&out, &partial, options)?;
        match is_leftover(&partial) && !options.resume && !options.force {
            true => Err(unfinished(&partial)),
            false => Ok(found),
        }
    }

    fn mark(&mut self, command: &str, fingerprint: &str) -> Result<()> {
        let path = self.partial.join(MARKER);
        let marker =
            Marker { format: FORMAT.into(), command: command.into(), fingerprint: fingerprint.into() };
        let text = serde_json::to_vec(&marker).map_err(|e| Error::file(&path, e.to_string()))?;
        let mut write = || {
            self._lock.set_len(0)?;
            self._lock.rewind()?;
            self._lock.write_all(&text)?;
            self._lock.sync_all()
        };
        write().map_err(Error::io(&path))
    }

    /// The folder to work in, `OUT.partial`.
    pub fn dir(&self) -> &Path {
        &self.partial
    }

    /// The folder that will be there in the end.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// Whether the run goes on from a leftover, which may hold nothing yet.
    pub fn resumed(&self) -> bool {
        self.resumed
    }

    /// From now on there is something in the folder that `--resume` can go on from: it stays if the run fails.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// Gives the work up: the folder goes, that of a resumed run too.
    pub fn discard(mut self) {
        self.keep = false;
    }

    /// Makes all files durable and puts the folder in its place. It is an error, and the work stays, if it has no
    /// `anabranch.json` (by which a later `--force` knows it), or if something has come to lie at OUT meanwhile.
    pub fn finish(mut self) -> Result<()> {
        if !self.partial.join(PROVENANCE).exists() {
            return Err(Error::file(&self.partial, format!("has no {PROVENANCE} at the end of the work")));
        }
        place::sync_tree(&self.partial)?;
        let old = match place::look(&self.out)? {
            Found::Nothing | Found::Empty => {
                std::fs::rename(&self.partial, &self.out).map_err(Error::io(&self.out))?;
                None
            }
            Found::Ours if self.force => Some(self.replace()?),
            _ => {
                self.keep = true;
                return Err(Error::file(
                    &self.out,
                    format!(
                        "has come to be while this run worked; the result is in {}",
                        self.partial.display()
                    ),
                ));
            }
        };
        self.done = true;
        // The output is in place; what is left is tidying up, which the next start would do too.
        if let Err(e) = tidy(&self.out, old.as_deref()) {
            tracing::warn!("the output is whole, but tidying up failed: {e}");
        }
        Ok(())
    }

    /// Puts the work in the place of an old output; gives where the old one is now.
    fn replace(&self) -> Result<PathBuf> {
        flag(&self.partial, EXCHANGE)?;
        match renameat_with(CWD, &self.partial, CWD, &self.out, RenameFlags::EXCHANGE) {
            Ok(()) => return Ok(self.partial.clone()),
            Err(Errno::NOSYS | Errno::INVAL | Errno::OPNOTSUPP) => {}
            Err(e) => return Err(Error::io(&self.out)(e.into())),
        }
        self.replace_by_old()
    }

    fn replace_by_old(&self) -> Result<PathBuf> {
        let old = place::beside(&self.out, ".old");
        if old.symlink_metadata().is_ok() {
            return Err(Error::file(&old, "is in the way of replacing an output: move it away"));
        }
        flag(&self.partial, BY_OLD)?;
        place::remove_file(&self.partial.join(EXCHANGE))?;
        std::fs::rename(&self.out, &old).map_err(Error::io(&self.out))?;
        std::fs::rename(&self.partial, &self.out).map_err(Error::io(&self.out))?;
        Ok(old)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.done || self.keep {
            return;
        }
        let removed = place::empty(&self.partial, &[MARKER])
            .and_then(|()| std::fs::remove_dir(&self.partial).map_err(Error::io(&self.partial)));
        match removed {
            Ok(()) => remove_parents(&self.parents),
            Err(e) => tracing::warn!("unfinished work was left behind: {e}"),
        }
    }
}

/// Removes folders that were made for an output, as far as nothing else is in them.
fn remove_parents(parents: &[PathBuf]) {
    for p in parents {
        if std::fs::remove_dir(p).is_err() {
            return;
        }
    }
}

/// What lies at an output's place, that this run may deal with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// Nothing, or an empty folder.
    New,
    /// Work of the same command that `--resume` goes on from.
    Unfinished,
    /// An output that `--force` replaces.
    Replaced,
    /// The finished output of `--resume`.
    Finished,
}

/// Whether `partial` is work that a run left.
fn is_leftover(partial: &Path) -> bool {
    partial.join(MARKER).exists()
}

fn standing(out: &Path, partial: &Path, options: OutputOptions) -> Result<Standing> {
    let leftover = is_leftover(partial);
    match place::look(out)? {
        Found::Nothing | Found::Empty if leftover && options.resume => Ok(Standing::Unfinished),
        Found::Nothing | Found::Empty => Ok(Standing::New),
        Found::Ours if options.resume && !leftover => Ok(Standing::Finished),
        Found::Ours if options.force => Ok(Standing::Replaced),
        Found::Ours if options.resume => Err(Error::Usage(format!(
            "{} exists, and {} is unfinished work that was to replace it: --resume --force goes on from it and replaces it",
            out.display(),
            partial.display()
        ))),
        Found::Ours => Err(Error::Usage(format!("{} exists: --force replaces it", out.display()))),
        // Nothing is replaced, so that what others put there is no matter.
        Found::Shared(_) if options.resume && !options.force && !leftover => Ok(Standing::Finished),
        Found::Shared(why) | Found::Foreign(why) => Err(Error::Usage(format!(
            "{} exists and {why}: only what this program made is ever replaced, so choose another name or move it away",
            out.display()
        ))),
    }
}

fn flag(dir: &Path, name: &str) -> Result<()> {
    let path = dir.join(name);
    File::create(&path).map_err(Error::io(&path))?;
    place::sync_dir(dir)
}

/// Makes or opens `OUT.partial` and locks its marker; gives what the marker of a leftover says.
fn claim(out: &Path, partial: &Path) -> Result<(File, Option<Marker>)> {
    match std::fs::create_dir(partial) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {
            let marked = partial.join(MARKER).exists();
            if !marked && place::look(partial)? != Found::Empty {
                return Err(Error::Usage(format!(
                    "{} is in the way and was not made by this program: move it away",
                    partial.display()
                )));
            }
        }
        other => other.map_err(Error::io(partial))?,
    }
    let path = partial.join(MARKER);
    let lock = lock_marker(out, &path, true)?.ok_or_else(|| busy(out))?;
    let mut text = Vec::new();
    (&lock).read_to_end(&mut text).map_err(Error::io(&path))?;
    if text.is_empty() {
        return Ok((lock, None));
    }
    // A marker that cannot be read is that of no command that could go on.
    let unknown = || Marker { format: FORMAT.into(), command: "unknown".into(), fingerprint: String::new() };
    let marker =
        serde_json::from_slice(&text).ok().filter(|m: &Marker| m.format == FORMAT).unwrap_or_else(unknown);
    Ok((lock, Some(marker)))
}

fn unfinished(partial: &Path) -> Error {
    Error::Usage(format!(
        "{} is unfinished work: --resume goes on from it, --force starts afresh",
        partial.display()
    ))
}

fn busy(out: &Path) -> Error {
    Error::Usage(format!("another run is writing {}", out.display()))
}

/// Opens and locks the marker at `path`, made where `create` asks for it; none where there is none. An error where
/// another run holds it, or took it away just now.
fn lock_marker(out: &Path, path: &Path, create: bool) -> Result<Option<File>> {
    let file = match File::options().read(true).write(true).create(create).truncate(false).open(path) {
        Err(e) if !create && matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        other => other.map_err(Error::io(path))?,
    };
    if !place::lock(&file, path)? {
        return Err(busy(out));
    }
    // The folder may have been put in its place between opening and locking.
    let same = std::fs::metadata(path)
        .is_ok_and(|there| file.metadata().is_ok_and(|m| (m.dev(), m.ino()) == (there.dev(), there.ino())));
    if same { Ok(Some(file)) } else { Err(busy(out)) }
}

/// Brings in order what a run left that was killed while it put its output in place.
fn repair(out: &Path, partial: &Path) -> Result<()> {
    let old = place::beside(out, ".old");
    if let Some(_lock) = lock_marker(out, &out.join(MARKER), false)? {
        let old = match (out.join(EXCHANGE).exists(), out.join(BY_OLD).exists()) {
            (true, _) if !partial.join(MARKER).exists() => Some(partial.to_path_buf()),
            (_, true) => Some(old),
            _ => None,
        };
        return tidy(out, old.as_deref());
    }
    if !partial.join(BY_OLD).exists() {
        return Ok(());
    }
    if let Some(_lock) = lock_marker(out, &partial.join(MARKER), false)? {
        if out.symlink_metadata().is_err() && old.exists() {
            std::fs::rename(&old, out).map_err(Error::io(&old))?;
        }
        place::remove_file(&partial.join(BY_OLD))?;
    }
    Ok(())
}

/// After an output is in place: removes the one that it replaced, then the flags and the marker.
fn tidy(out: &Path, old: Option<&Path>) -> Result<()> {
    if let Some(old) = old {
        match place::look(old)? {
            Found::Ours | Found::Empty => {
                place::empty(old, &[PROVENANCE])?;
                std::fs::remove_dir(old).map_err(Error::io(old))?;
            }
            Found::Nothing => {}
            Found::Shared(why) | Found::Foreign(why) => {
                return Err(Error::file(old, format!("{why}: it is not deleted, move it away")));
            }
        }
    }
    for name in [EXCHANGE, BY_OLD, MARKER] {
        place::remove_file(&out.join(name))?;
    }
    place::sync_dir(place::parent(out))
}

#[cfg(test)]
mod tests {
    use super::super::provenance::{Provenance, Verdict};
    use super::*;
    use std::collections::BTreeMap;

    const FRESH: OutputOptions = OutputOptions { force: false, resume: false };
    const FORCE: OutputOptions = OutputOptions { force: true, resume: false };
    const RESUME: OutputOptions = OutputOptions { force: false, resume: true };

    fn begin(out: &Path, print: &str, options: OutputOptions) -> Result<Output> {
        match Output::begin(out, "train", print, options)? {
            Begun::Work(o) => Ok(o),
            Begun::Finished => Err(Error::Usage("already finished".into())),
        }
    }

    fn refused(out: &Path, print: &str, options: OutputOptions) -> String {
        begin(out, print, options).unwrap_err().to_string()
    }

    /// Puts `content` in the folder and seals it, as a stage does at its end.
    fn fill(dir: &Path, content: &str) {
        std::fs::create_dir_all(dir.join("sub")).unwrap();
        std::fs::write(dir.join("sub/f"), content).unwrap();
        Provenance::new("train").seal(dir, BTreeMap::new()).unwrap();
    }

    fn make(out: &Path, content: &str, options: OutputOptions) {
        let o = begin(out, "p", options).unwrap();
        fill(o.dir(), content);
        o.finish().unwrap();
    }

    /// The content of a whole output, and nothing beside it.
    fn whole(out: &Path) -> String {
        assert!(Provenance::verify(out).unwrap().values().all(|v| *v == Verdict::Same));
        let mut names: Vec<_> = std::fs::read_dir(out).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [PROVENANCE, "sub"]);
        assert!(!place::beside(out, ".partial").exists() && !place::beside(out, ".old").exists());
        std::fs::read_to_string(out.join("sub/f")).unwrap()
    }

    #[test]
    fn appears_whole_and_is_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a/b/out");
        make(&out, "one", FRESH);
        assert_eq!(whole(&out), "one");
        assert!(refused(&out, "p", FRESH).contains("exists: --force replaces it"));
        assert_eq!(refused(&out, "p", RESUME), "already finished");
        make(&out, "two", FORCE);
        assert_eq!(whole(&out), "two");
        let empty = dir.path().join("empty");
        std::fs::create_dir(&empty).unwrap();
        make(&empty, "three", FRESH);
        assert_eq!(whole(&empty), "three");
    }

    #[test]
    fn a_failed_run_leaves_nothing_and_a_kept_one_its_work() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a/b/out");
        let o = begin(&out, "p", FRESH).unwrap();
        std::fs::write(o.dir().join("half"), "x").unwrap();
        drop(o);
        assert!(!dir.path().join("a").exists());
        let mut o = begin(&out, "p", FRESH).unwrap();
        std::fs::write(o.dir().join("state"), "x").unwrap();
        o.keep();
        drop(o);
        let err = refused(&out, "p", FRESH);
        assert!(err.contains("--resume goes on from it, --force starts afresh"), "{err}");
        let err = refused(&out, "other", RESUME);
        assert!(err.contains("unfinished work of another command (train"), "{err}");
        let o = begin(&out, "p", RESUME).unwrap();
        assert!(o.resumed() && o.dir().join("state").exists());
        drop(o);
        let o = begin(&out, "q", FORCE).unwrap();
        assert!(!o.resumed() && !o.dir().join("state").exists());
    }

    /// Never what is there already, as if it were what the run was to make.
    #[test]
    fn a_replacement_that_was_stopped_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        make(&out, "old", FRESH);
        let mut o = begin(&out, "new inputs", FORCE).unwrap();
        std::fs::write(o.dir().join("state"), "x").unwrap();
        o.keep();
        drop(o);
        assert!(Output::is_unfinished(&out));
        assert!(refused(&out, "new inputs", FRESH).contains("exists: --force replaces it"));
        assert!(refused(&out, "new inputs", RESUME).contains("--resume --force goes on from it"));
        let on = OutputOptions { force: true, resume: true };
        assert_eq!(Output::look_ahead(&out, on).unwrap(), Standing::Replaced);
        let o = begin(&out, "new inputs", on).unwrap();
        assert!(o.resumed());
        std::fs::remove_file(o.dir().join("state")).unwrap();
        fill(o.dir(), "new");
        o.finish().unwrap();
        assert_eq!(whole(&out), "new");
        assert!(!Output::is_unfinished(&out));
        assert_eq!(refused(&out, "new inputs", on), "already finished");
    }

    #[test]
    fn what_is_begun_anew_holds_nothing_of_a_leftover() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let anew = |print: &str, options| match Output::begin_anew(&out, "train", print, options).unwrap() {
            Begun::Work(o) => o,
            Begun::Finished => panic!("already finished"),
        };
        for end in [true, false] {
            let partial = sealed(&out, "stale", &[]);
            assert!(refused(&out, "other", RESUME).contains("unfinished work of another command"));
            let o = anew("p", RESUME);
            assert!(!o.resumed());
            let names: Vec<_> =
                std::fs::read_dir(&partial).unwrap().map(|e| e.unwrap().file_name()).collect();
            assert_eq!(names, [MARKER]);
            if end {
                drop(o);
                assert!(!partial.exists());
            } else {
                fill(o.dir(), "new");
                o.finish().unwrap();
                assert_eq!(whole(&out), "new");
            }
        }
    }

    #[test]
    fn one_run_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let o = begin(&out, "p", FRESH).unwrap();
        for options in [FRESH, FORCE, RESUME] {
            assert!(refused(&out, "p", options).contains("another run is writing"));
        }
        make(&dir.path().join("other"), "x", FRESH);
        std::fs::create_dir(&out).unwrap();
        std::fs::write(out.join("mine"), "x").unwrap();
        fill(o.dir(), "y");
        let err = o.finish().unwrap_err().to_string();
        assert!(err.contains("has come to be while this run worked; the result is in"), "{err}");
        assert_eq!(std::fs::read_to_string(out.join("mine")).unwrap(), "x");
    }

    #[test]
    fn what_was_not_made_here_is_never_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        std::fs::create_dir(&out).unwrap();
        std::fs::write(out.join("f"), "x").unwrap();
        for options in [FRESH, FORCE, RESUME] {
            assert!(
                refused(&out, "p", options).contains("has no anabranch.json: only what this program made")
            );
        }
        std::fs::write(out.join(PROVENANCE), "{}").unwrap();
        assert!(refused(&out, "p", FORCE).contains("that is not this program's"));
        std::fs::remove_dir_all(&out).unwrap();
        make(&out, "one", FRESH);
        for name in ["notes.txt", ".hidden", "sub/notes"] {
            std::fs::write(out.join(name), "x").unwrap();
            let err = refused(&out, "p", FORCE);
            assert!(err.contains(&format!("has {name}, which this program did not put there")), "{err}");
            // Nothing is replaced where the work is done.
            assert!(matches!(Output::begin(&out, "p", "one", RESUME).unwrap(), Begun::Finished));
            std::fs::remove_file(out.join(name)).unwrap();
        }
        std::fs::write(out.join("metrics.jsonl"), "").unwrap();
        assert!(begin(&out, "p", FORCE).is_ok());
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        assert!(refused(&file, "p", FORCE).contains("is no folder"));
        let folders = dir.path().join("folders/in/it");
        std::fs::create_dir_all(&folders).unwrap();
        assert!(refused(&dir.path().join("folders"), "p", FORCE).contains("has folders in it"));
        let other = dir.path().join("other");
        std::fs::create_dir(place::beside(&other, ".partial")).unwrap();
        std::fs::write(place::beside(&other, ".partial").join("f"), "x").unwrap();
        assert!(refused(&other, "p", FORCE).contains("is in the way and was not made by this program"));
    }

    #[test]
    fn paths_that_cannot_be_replaced_in_one_step() {
        for out in [".", "..", "/", "a/.", "a/..", "./"] {
            let err = refused(Path::new(out), "p", FORCE);
            assert!(err.contains("needs a name of its own"), "{out}: {err}");
        }
        assert!(refused(Path::new("/proc"), "p", FORCE).contains("is a mount point"));
        let here = std::env::current_dir().unwrap();
        assert!(refused(&here, "p", FORCE).contains("is the folder that the command runs in"));
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path().join("none"), &link).unwrap();
        assert!(refused(&link, "p", FRESH).contains("is a link to nothing"));
        std::fs::create_dir(dir.path().join("none")).unwrap();
        make(&link, "through", FRESH);
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!(whole(&dir.path().join("none")), "through");
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(refused(&dir.path().join("file/out"), "p", FRESH).contains("file"));
    }

    #[test]
    fn an_end_without_provenance_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let o = begin(&dir.path().join("out"), "p", FRESH).unwrap();
        assert!(o.finish().unwrap_err().to_string().contains("has no anabranch.json at the end"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    /// A new output that is sealed and not yet in place, as a kill leaves it: nobody holds the lock.
    fn sealed(out: &Path, content: &str, flags: &[&str]) -> PathBuf {
        let mut o = begin(out, "p", FORCE).unwrap();
        fill(o.dir(), content);
        o.keep();
        let partial = o.dir().to_path_buf();
        drop(o);
        for f in flags {
            flag(&partial, f).unwrap();
        }
        partial
    }

    #[test]
    fn killed_around_the_exchange() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        make(&out, "old", FRESH);
        // Before it: the old one is whole, the new one can be gone on from.
        let partial = sealed(&out, "new", &[EXCHANGE]);
        assert!(refused(&out, "p", FRESH).contains("exists"));
        begin(&out, "p", OutputOptions { force: true, resume: true }).unwrap().finish().unwrap();
        assert_eq!(whole(&out), "new");
        // After it, and after a part of the old one was deleted.
        for half in [false, true] {
            let partial2 = sealed(&out, "newer", &[EXCHANGE]);
            assert_eq!(partial, partial2);
            renameat_with(CWD, &partial, CWD, &out, RenameFlags::EXCHANGE).unwrap();
            if half {
                std::fs::remove_dir_all(partial.join("sub")).unwrap();
            }
            assert_eq!(refused(&out, "p", RESUME), "already finished");
            assert_eq!(whole(&out), "newer");
        }
    }

    #[test]
    fn killed_between_the_two_renames() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let old = place::beside(&out, ".old");
        make(&out, "old", FRESH);
        // After the first: the next start gives the old one its name back.
        let partial = sealed(&out, "new", &[BY_OLD]);
        std::fs::rename(&out, &old).unwrap();
        assert!(refused(&out, "p", FRESH).contains("exists"));
        assert_eq!(std::fs::read_to_string(out.join("sub/f")).unwrap(), "old");
        // After the second: the new one is in place, the old one is deleted.
        flag(&partial, BY_OLD).unwrap();
        std::fs::rename(&out, &old).unwrap();
        std::fs::rename(&partial, &out).unwrap();
        assert!(refused(&out, "p", FRESH).contains("exists"));
        assert_eq!(whole(&out), "new");
    }

    #[test]
    fn without_exchange_by_way_of_old() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        make(&out, "old", FRESH);
        let mut o = begin(&out, "p", FORCE).unwrap();
        fill(o.dir(), "new");
        let old = o.replace_by_old().unwrap();
        o.done = true;
        tidy(&out, Some(&old)).unwrap();
        drop(o);
        assert_eq!(whole(&out), "new");
        // A folder of that name that somebody made stays, and so does the old output.
        let old = place::beside(&out, ".old");
        std::fs::create_dir(&old).unwrap();
        let o = begin(&out, "p", FORCE).unwrap();
        assert!(o.replace_by_old().unwrap_err().to_string().contains("in the way"));
        drop(o);
        std::fs::remove_dir(&old).unwrap();
        assert_eq!(whole(&out), "new");
    }

    #[test]
    fn a_folder_called_old_without_our_flag_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (out, old) = (dir.path().join("out"), dir.path().join("out.old"));
        make(&old, "kept", FRESH);
        make(&out, "new", FRESH);
        assert_eq!(std::fs::read_to_string(old.join("sub/f")).unwrap(), "kept");
        std::fs::remove_dir_all(&out).unwrap();
        drop(begin(&out, "p", FRESH).unwrap());
        assert!(old.exists() && !out.exists());
    }

    #[test]
    fn a_marker_that_cannot_be_read_can_be_forced_away() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let partial = sealed(&out, "x", &[]);
        std::fs::write(partial.join(MARKER), "{").unwrap();
        assert!(refused(&out, "p", RESUME).contains("another command (unknown"));
        make(&out, "y", FORCE);
        assert_eq!(whole(&out), "y");
        // Killed before the marker was written, or even made.
        std::fs::create_dir(&partial).unwrap();
        std::fs::write(partial.join(MARKER), "").unwrap();
        drop(begin(&out, "p", FORCE).unwrap());
        std::fs::create_dir(&partial).unwrap();
        make(&out, "z", FORCE);
        assert_eq!(whole(&out), "z");
    }

    /// A file system of 256 KiB on a folder, unmounted in the end; none where this process may not mount one.
    struct Small(PathBuf);

    impl Small {
        fn mount(dir: &Path) -> Option<Small> {
            let mount = std::process::Command::new("mount")
                .args(["-t", "tmpfs", "-o", "size=256k", "none"])
                .arg(dir)
                .output();
            if !mount.is_ok_and(|m| m.status.success()) {
                eprintln!("skipped: this process may not mount a file system");
                return None;
            }
            Some(Small(dir.to_path_buf()))
        }
    }

    impl Drop for Small {
        fn drop(&mut self) {
            let _ = std::process::Command::new("umount").arg(&self.0).status();
        }
    }

    #[test]
    fn a_full_disk_leaves_nothing_and_a_mount_point_is_refused() {
        use super::super::writer::{SafetensorsWriter, TensorSpec};
        let dir = tempfile::tempdir().unwrap();
        let Some(small) = Small::mount(dir.path()) else { return };
        assert!(refused(&small.0, "p", FORCE).contains("is a mount point"));
        let out = small.0.join("a/out");
        let o = begin(&out, "p", FRESH).unwrap();
        let spec = TensorSpec::new("t", crate::tensor::DType::F32, [1 << 17]);
        let mut w = SafetensorsWriter::create(&o.dir().join("f.safetensors"), vec![spec], &[]).unwrap();
        let err = w.write("t", &vec![1; 1 << 19]).unwrap_err().to_string();
        assert!(err.contains("a/out.partial/f.safetensors: No space left on device"), "{err}");
        drop((w, o));
        assert_eq!(std::fs::read_dir(&small.0).unwrap().count(), 0);
        let status =
            std::process::Command::new("mount").args(["-o", "remount,ro"]).arg(&small.0).status().unwrap();
        assert!(status.success());
        let err = refused(&small.0.join("out"), "p", FRESH);
        assert!(err.contains("out.partial: Read-only file system"), "{err}");
    }
}
