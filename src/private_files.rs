//! Files that hold histories, records and tokens: nobody else may read them, and none is written through a symbolic link, which
//! somebody else may have put there.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// Options with which a file is created for its owner alone, and no link is followed.
#[must_use]
pub(crate) fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
    options
}

/// Creates a file that is not there yet; for programs that would create it in their own way.
///
/// # Errors
/// A symbolic link, or a file that cannot be created.
pub(crate) fn ensure(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_symlink() => Err(io::Error::other(
            "is a symbolic link, expected the file itself",
        )),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => create(path).map(drop),
        Err(error) => Err(error),
    }
}

fn create(path: &Path) -> io::Result<File> {
    let created = options().write(true).create_new(true).open(path);
    match created {
        // Somebody else was faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            options().write(true).open(path)
        }
        created => created,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn a_file_is_its_owners_and_no_link_is_followed() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        ensure(&at("file")).unwrap();
        let mode = std::fs::metadata(at("file")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        ensure(&at("file")).unwrap();
        symlink(at("elsewhere"), at("dangling")).unwrap();
        symlink(at("file"), at("link")).unwrap();
        for link in ["dangling", "link"] {
            assert!(ensure(&at(link)).is_err(), "{link}");
            assert!(options().write(true).create(true).open(at(link)).is_err());
        }
        assert!(!at("elsewhere").exists());
    }
}
