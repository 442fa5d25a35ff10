//! Ed25519 keys (RFC 8032): a secret one that signs, public ones that a folder says are trusted, and as what.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize, Serializer};

use super::{json, place};
use crate::error::{Error, Result};

const SECRET: &str = "anabranch-secret-key/1";
const PUBLIC: &str = "anabranch-public-key/1";
/// What a public key's file ends with.
pub const PUBLIC_SUFFIX: &str = ".pub";
/// The folder in a trusted folder whose keys count for edges only.
const EDGES: &str = "edges";
/// The folder in a trusted folder whose keys count for recoverers only.
const RECOVERERS: &str = "recoverers";
/// A key's file is a line.
const MAX_KEY_FILE: u64 = 4096;
/// More keys than a federation has, fewer than fill memory.
const MAX_KEYS: usize = 100_000;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SecretFile {
    format: String,
    secret_key: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PublicFile {
    format: String,
    public_key: String,
}

/// `text` as N bytes: exactly `2 N` hexadecimal digits in lower case, so that bytes have one spelling.
pub fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut out = [0; N];
    hex::decode_to_slice(text, &mut out).ok()?;
    text.bytes().all(|b| !b.is_ascii_uppercase()).then_some(out)
}

/// A public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// The key that 64 hexadecimal digits name; none where they are no point of the curve, or one of the few for which
    /// anybody can make signatures.
    pub fn from_hex(text: &str) -> Option<PublicKey> {
        let bytes = from_hex(text)?;
        let key = VerifyingKey::from_bytes(&bytes).ok()?;
        (!key.is_weak()).then_some(PublicKey(bytes))
    }

    /// Reads the file at `path`.
    pub fn read(path: &Path) -> Result<PublicKey> {
        PublicKey::parse(path, &json::read_at_most(path, MAX_KEY_FILE)?)
    }

    /// Reads `text`; `path` is for the errors' text.
    pub fn parse(path: &Path, text: &[u8]) -> Result<PublicKey> {
        let value = json::parse(path, text)?;
        if value.get("format").and_then(|f| f.as_str()) == Some(SECRET) {
            let why =
                format!("is a secret key, expected a public one (FILE{PUBLIC_SUFFIX}): never hand it out");
            return Err(Error::file(path, why));
        }
        let file: PublicFile = json::typed(path, json::parse_format(path, text, PUBLIC)?)?;
        PublicKey::from_hex(&file.public_key).ok_or_else(|| {
            Error::file(
                path,
                format!(
                    "public_key is {:?}, expected 64 hexadecimal digits of an ed25519 key",
                    file.public_key
                ),
            )
        })
    }

    /// Whether `signature` is one of `message` by this key. Strict: of the several encodings that some verifiers take
    /// for one signature, only the canonical one counts (RFC 8032, section 5.1.7, without the cofactor).
    pub fn verifies(&self, message: &[u8], signature: &[u8; 64]) -> bool {
        VerifyingKey::from_bytes(&self.0)
            .is_ok_and(|key| key.verify_strict(message, &Signature::from_bytes(signature)).is_ok())
    }

    /// The first 16 digits, which tell keys apart for people.
    pub fn short(&self) -> String {
        hex::encode(&self.0[..8])
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

impl Serialize for PublicKey {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// A secret key. It is never printed, and its numbers are wiped when it is dropped.
pub struct SecretKey(SigningKey);

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretKey(of {})", self.public())
    }
}

impl SecretKey {
    /// A new key from the system's random numbers.
    pub fn generate() -> Result<SecretKey> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed)
            .map_err(|e| Error::Device(format!("the system gives no random numbers for a key: {e}")))?;
        Ok(SecretKey(SigningKey::from_bytes(&seed)))
    }

    /// Reads the file at `path`, which nobody but its owner may read.
    pub fn read(path: &Path) -> Result<SecretKey> {
        let mode = std::fs::metadata(path).map_err(Error::io(path))?.mode() & 0o777;
        let key = SecretKey::parse(path, &json::read_at_most(path, MAX_KEY_FILE)?)?;
        if mode & 0o077 != 0 {
            return Err(Error::file(
                path,
                format!(
                    "has mode {mode:04o}, expected 0600: others may have read this key; run chmod 600, or make a new one"
                ),
            ));
        }
        Ok(key)
    }

    /// Reads `text`; `path` is for the errors' text, which do not show the key.
    pub fn parse(path: &Path, text: &[u8]) -> Result<SecretKey> {
        let value = json::parse(path, text)?;
        if value.get("format").and_then(|f| f.as_str()) == Some(PUBLIC) {
            return Err(Error::file(path, "is a public key, expected the secret one: the file without .pub"));
        }
        let file: SecretFile = json::typed(path, json::parse_format(path, text, SECRET)?)?;
        let seed = from_hex(&file.secret_key)
            .ok_or_else(|| Error::file(path, "secret_key is not 64 hexadecimal digits in lower case"))?;
        Ok(SecretKey(SigningKey::from_bytes(&seed)))
    }

    /// Writes the key to `path`, for its owner alone, and the public one to `path.pub`. An error where either is there.
    pub fn write(&self, path: &Path) -> Result<PathBuf> {
        let public = place::beside(path, PUBLIC_SUFFIX);
        for there in [path, &public] {
            if there.symlink_metadata().is_ok() {
                let why = format!("{} exists: a key is never replaced, choose another name", there.display());
                return Err(Error::Usage(why));
            }
        }
        let secret = SecretFile { format: SECRET.into(), secret_key: hex::encode(self.0.to_bytes()) };
        let open = PublicFile { format: PUBLIC.into(), public_key: self.public().to_string() };
        create(path, 0o600, &secret)?;
        if let Err(e) = create(&public, 0o644, &open) {
            place::remove_file(path)?;
            return Err(e);
        }
        place::sync_dir(place::parent(path))?;
        Ok(public)
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key().to_bytes())
    }

    /// The signature of `message`; the same each time.
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.0.sign(message).to_bytes()
    }
}

/// Makes the file at `path`, which must not be there, with one line of JSON; removed again where that fails.
fn create(path: &Path, mode: u32, value: &impl Serialize) -> Result<()> {
    let text = json::line(path, value)?;
    let mut file: File =
        File::options().write(true).create_new(true).mode(mode).open(path).map_err(Error::io(path))?;
    let written = file.write_all(&text).and_then(|()| file.sync_all()).map_err(Error::io(path));
    if written.is_err() {
        place::remove_file(path)?;
    }
    written
}

/// What a key is trusted to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// That it trained an adapter.
    Edge,
    /// That it recovered one.
    Recoverer,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Edge => "an edge",
            Role::Recoverer => "a recoverer",
        })
    }
}

/// One trusted key.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    name: String,
    edge: bool,
    recoverer: bool,
}

impl Entry {
    fn has(&self, role: Role) -> bool {
        match role {
            Role::Edge => self.edge,
            Role::Recoverer => self.recoverer,
        }
    }
}

/// The keys in a folder: `NAME.pub` in it counts for every role, `edges/NAME.pub` for edges, `recoverers/NAME.pub` for
/// recoverers.
#[derive(Clone, Debug)]
pub struct Trusted {
    folder: PathBuf,
    keys: BTreeMap<PublicKey, Entry>,
}

impl Trusted {
    /// Reads the keys in `folder`. An error where there is none, where a file is no public key, and for any other folder
    /// in it: a misspelt one would be a silent gap.
    pub fn open(folder: &Path) -> Result<Trusted> {
        let mut trusted = Trusted { folder: folder.to_path_buf(), keys: BTreeMap::new() };
        for entry in entries(folder)? {
            let (roles, name) = match entry.file_name().and_then(|n| n.to_str()) {
                Some(EDGES) if entry.is_dir() => ((true, false), EDGES),
                Some(RECOVERERS) if entry.is_dir() => ((false, true), RECOVERERS),
                _ if entry.is_dir() => {
                    let why = format!(
                        "is a folder, expected {EDGES}, {RECOVERERS} or keys named NAME{PUBLIC_SUFFIX}"
                    );
                    return Err(Error::file(&entry, why));
                }
                _ => {
                    trusted.add(&entry, (true, true))?;
                    continue;
                }
            };
            for key in entries(&folder.join(name))? {
                trusted.add(&key, roles)?;
            }
        }
        if trusted.keys.is_empty() {
            let why = format!("has no key: put the public keys there that you trust, as NAME{PUBLIC_SUFFIX}");
            return Err(Error::file(folder, why));
        }
        Ok(trusted)
    }

    fn add(&mut self, path: &Path, (edge, recoverer): (bool, bool)) -> Result<()> {
        let name = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix(PUBLIC_SUFFIX));
        let Some(name) = name.filter(|n| !n.is_empty()) else { return Ok(()) };
        let key = PublicKey::read(path)?;
        if self.keys.len() >= MAX_KEYS {
            return Err(Error::file(&self.folder, format!("has more than {MAX_KEYS} keys")));
        }
        let entry =
            self.keys.entry(key).or_insert(Entry { name: name.into(), edge: false, recoverer: false });
        if entry.name != name {
            let why = format!("is the key of {:?} too: one key, one name", entry.name);
            return Err(Error::file(path, why));
        }
        entry.edge |= edge;
        entry.recoverer |= recoverer;
        Ok(())
    }

    /// What the folder calls `key`, or why it is not trusted as `role`.
    pub fn name(&self, key: &PublicKey, role: Role) -> Result<&str, String> {
        let folder = self.folder.display();
        match self.keys.get(key) {
            None => Err(format!("is signed by key {}, which is not in {folder}", key.short())),
            Some(e) if e.has(role) => Ok(&e.name),
            Some(e) => Err(format!("is signed by {:?}, whom {folder} does not trust as {role}", e.name)),
        }
    }
}

/// What is in `folder`, in the order of names.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        out.push(entry.map_err(Error::io(folder))?.path());
    }
    out.sort();
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_known_signature() {
        // RFC 8032, section 7.1, test 2.
        let seed = from_hex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb").unwrap();
        let key = SecretKey(SigningKey::from_bytes(&seed));
        assert_eq!(
            key.public().to_string(),
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
        );
        let signature = key.sign(&[0x72]);
        assert!(
            hex::encode(signature)
                .starts_with("92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da")
        );
        assert!(key.public().verifies(&[0x72], &signature));
        assert!(!key.public().verifies(&[0x73], &signature));
        // The same signature with s + L for s, which lax verifiers take.
        let mut malleable = signature;
        let order =
            from_hex::<32>("edd3f55c1a631258d69cf7a2def9de1400000000000000000000000000000010").unwrap();
        let mut carry = 0;
        for (s, l) in malleable[32..].iter_mut().zip(order) {
            let sum = u16::from(*s) + u16::from(l) + carry;
            (*s, carry) = (sum as u8, sum >> 8);
        }
        assert!(!key.public().verifies(&[0x72], &malleable));
    }

    #[test]
    fn keys_that_anybody_can_sign_for_are_none() {
        for text in
            [format!("01{}", "0".repeat(62)), "0".repeat(64), "g".repeat(64), "0".repeat(63), String::new()]
        {
            assert!(PublicKey::from_hex(&text).is_none(), "{text}");
        }
        let upper = "3D4017C3E843895A92B70AA74D1B7EBC9C982CCF2EC4968CC0CD55F12AF4660C";
        assert!(PublicKey::from_hex(upper).is_none() && PublicKey::from_hex(&upper.to_lowercase()).is_some());
    }

    #[test]
    fn written_for_the_owner_alone_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k");
        let key = SecretKey::generate().unwrap();
        let public = key.write(&path).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        assert_eq!(SecretKey::read(&path).unwrap().public(), key.public());
        assert_eq!(PublicKey::read(&public).unwrap(), key.public());
        assert!(key.write(&path).unwrap_err().to_string().contains("never replaced"));
        assert!(PublicKey::read(&path).unwrap_err().to_string().contains("is a secret key"));
        assert!(SecretKey::read(&public).unwrap_err().to_string().contains("is a public key"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(SecretKey::read(&path).unwrap_err().to_string().contains("has mode 0644, expected 0600"));
        assert_ne!(SecretKey::generate().unwrap().public(), key.public());
        assert!(!format!("{key:?}").contains(&hex::encode(key.0.to_bytes())));
    }

    #[test]
    fn a_key_counts_for_the_roles_of_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        let d = dir.path();
        assert!(Trusted::open(d).unwrap_err().to_string().contains("has no key"));
        let put = |folder: &str, name: &str| {
            std::fs::create_dir_all(d.join(folder)).unwrap();
            let key = SecretKey::generate().unwrap();
            key.write(&d.join(folder).join(name)).unwrap();
            key.public()
        };
        let (all, edge, cloud) = (put("", "all"), put("edges", "hum"), put("recoverers", "cloud"));
        let trusted = Trusted::open(d).unwrap();
        assert_eq!(
            (trusted.name(&all, Role::Edge), trusted.name(&all, Role::Recoverer)),
            (Ok("all"), Ok("all"))
        );
        assert_eq!(trusted.name(&edge, Role::Edge), Ok("hum"));
        assert!(trusted.name(&edge, Role::Recoverer).unwrap_err().contains("does not trust as a recoverer"));
        assert!(trusted.name(&cloud, Role::Edge).unwrap_err().contains("does not trust as an edge"));
        let stranger = SecretKey::generate().unwrap().public();
        assert!(trusted.name(&stranger, Role::Edge).unwrap_err().contains("is not in"));
        // A key in two folders has both roles, if it has one name.
        std::fs::copy(d.join("edges/hum.pub"), d.join("recoverers/hum.pub")).unwrap();
        assert!(Trusted::open(d).unwrap().name(&edge, Role::Recoverer).is_ok());
        std::fs::copy(d.join("edges/hum.pub"), d.join("edges/sc.pub")).unwrap();
        assert!(Trusted::open(d).unwrap_err().to_string().contains("one key, one name"));
        std::fs::remove_file(d.join("edges/sc.pub")).unwrap();
        std::fs::create_dir(d.join("edge")).unwrap();
        assert!(Trusted::open(d).unwrap_err().to_string().contains("expected edges, recoverers"));
    }
}
