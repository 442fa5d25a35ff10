//! `data`: data sets made, cut, judged by people, and given to other programs.

pub mod cross;
pub mod export;
pub mod import;
pub mod review;
pub mod split;

#[cfg(test)]
mod killed {
    //! What a run leaves that is killed, and what the next one makes of it.

    use std::collections::BTreeMap;
    use std::path::Path;

    use crate::checkpoint::output::{Begun, Output, OutputOptions};
    use crate::stage::common::Common;

    /// `run` writes the same into a new folder as into that of a run of `command` that was killed when it had written a
    /// part of `stale`.
    pub(super) fn goes_on(command: &str, fingerprint: &str, stale: &str, run: impl Fn(&Path, &Common)) {
        let dir = tempfile::tempdir().unwrap();
        let (undisturbed, out) = (dir.path().join("undisturbed"), dir.path().join("out"));
        run(&undisturbed, &Common::default());
        let begun = Output::begin(&out, command, fingerprint, OutputOptions::default()).unwrap();
        let Begun::Work(mut output) = begun else { unreachable!("nothing is there") };
        let half = output.dir().join(stale);
        std::fs::create_dir_all(half.parent().unwrap()).unwrap();
        std::fs::write(half, "half a li").unwrap();
        output.keep();
        drop(output);
        run(&out, &Common { resume: true, ..Common::default() });
        assert_eq!(files(&out), files(&undisturbed));
    }

    /// The bytes of all files below `dir`.
    fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
        let mut found = BTreeMap::new();
        for entry in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap()) {
            let (path, name) = (entry.path(), entry.file_name().into_string().unwrap());
            if path.is_dir() {
                found.extend(
                    files(&path).into_iter().map(|(below, bytes)| (format!("{name}/{below}"), bytes)),
                );
            } else {
                found.insert(name, std::fs::read(path).unwrap());
            }
        }
        found
    }
}
