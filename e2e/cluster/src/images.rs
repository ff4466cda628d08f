//! Images without a container engine: a layer, a configuration and a list of both, in one archive that a runtime imports.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::files::Files;
use crate::shell::run;

/// What holds a pod's namespaces.
pub const PAUSE: &str = "culvert.test/pause:1";

/// An image to be made.
#[derive(Debug, Default)]
pub struct Image {
    /// Every name it has, each with a registry and a tag.
    pub names: Vec<String>,
    /// From where, to which absolute path in the image. A directory is copied whole.
    pub copies: Vec<(PathBuf, String)>,
    /// What a container of it runs.
    pub entrypoint: Vec<String>,
    /// Further variables, NAME=value.
    pub environment: Vec<String>,
}

impl Image {
    /// One program. One that is not static (of an unoptimised build) brings the libraries that it loads.
    ///
    /// # Errors
    /// If it is not there.
    pub fn of_program(name: &str, program: &Path) -> Result<Self> {
        ensure!(program.is_file(), "{} is missing", program.display());
        let file = program.file_name().unwrap_or_default().to_string_lossy();
        let mut copies: Vec<_> =
            libraries(program)?.into_iter().map(|it| (it.clone(), it.display().to_string())).collect();
        copies.push((program.to_owned(), format!("/{file}")));
        Ok(Self {
            names: vec![name.to_owned()],
            copies,
            entrypoint: vec![format!("/{file}")],
            environment: Vec::new(),
        })
    }

    /// Programs of this machine with every library that they load: an application image for tests, made of what Debian installed.
    ///
    /// # Errors
    /// If a program is not there.
    pub fn of_machine(names: &[&str], programs: &[&str], directories: &[&str]) -> Result<Self> {
        let mut copies = BTreeSet::new();
        for program in programs {
            let path = which(program)?;
            copies.extend(libraries(&path)?.into_iter().map(|it| (it.clone(), it.display().to_string())));
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            copies.insert((path.canonicalize()?, format!("/usr/bin/{name}")));
        }
        for directory in directories {
            ensure!(Path::new(directory).is_dir(), "{directory} is missing");
            copies.insert((PathBuf::from(directory), (*directory).to_owned()));
        }
        Ok(Self {
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            copies: copies.into_iter().collect(),
            entrypoint: Vec::new(),
            environment: Vec::new(),
        })
    }

    /// Writes the archive, in the form that `docker save` has and `ctr images import` takes. `scratch` is used and emptied.
    ///
    /// # Errors
    /// If a file cannot be copied or written.
    pub fn write(&self, scratch: &Path, archive: &Path) -> Result<()> {
        let _ = fs::remove_dir_all(scratch);
        let root = scratch.join("root");
        // Usual places, so that a container with a read-only root still finds where to mount.
        for directory in ["tmp", "etc", "var/run", "usr/bin"] {
            fs::create_dir_all(root.join(directory))?;
        }
        std::os::unix::fs::symlink("usr/bin", root.join("bin"))?;
        for (from, to) in &self.copies {
            let to = root.join(to.trim_start_matches('/'));
            fs::create_dir_all(to.parent().context("a path in an image has a parent")?)?;
            // A file is copied for the link that leads to it; links within a directory stay.
            let how = if from.is_dir() { "-a" } else { "-L" };
            run(Command::new("cp").args([how, "--preserve=mode", "-T"]).arg(from).arg(&to))
                .with_context(|| format!("copying {} into an image", from.display()))?;
        }
        // Of a program that is all there is in the image nobody reads line numbers: most of its bytes.
        if let [program] = self.entrypoint.as_slice() {
            let program = root.join(program.trim_start_matches('/'));
            run(Command::new("strip").arg("--strip-debug").arg(program))
                .context("strip is of the package binutils")?;
        }
        let layer = scratch.join("layer.tar");
        // The same content gives the same archive.
        run(Command::new("tar")
            .args(["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner", "-C"])
            .arg(&root)
            .arg("-cf")
            .arg(&layer)
            .arg("."))?;
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let mut environment = vec!["PATH=/usr/bin:/bin".to_owned()];
        environment.extend(self.environment.iter().cloned());
        let config = json!({
            "architecture": architecture, "os": "linux", "created": "1970-01-01T00:00:00Z",
            "config": { "Entrypoint": self.entrypoint, "Env": environment, "WorkingDir": "/" },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", digest(&layer)?)] },
        });
        fs::write(scratch.join("config.json"), config.to_string())?;
        let manifest = json!([{ "Config": "config.json", "RepoTags": self.names, "Layers": ["layer.tar"] }]);
        fs::write(scratch.join("manifest.json"), manifest.to_string())?;
        run(Command::new("tar").arg("-C").arg(scratch).arg("-cf").arg(archive).args([
            "manifest.json",
            "config.json",
            "layer.tar",
        ]))?;
        fs::remove_dir_all(scratch)?;
        Ok(())
    }
}

/// The archive of [`PAUSE`].
pub(crate) fn pause(files: &Files, program: &Path) -> Result<PathBuf> {
    let archive = files.at("pause.tar");
    Image::of_program(PAUSE, program)?.write(&files.at("image"), &archive)?;
    Ok(archive)
}

fn digest(file: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut file = File::open(file)?;
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => hash.update(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn which(program: &str) -> Result<PathBuf> {
    if program.starts_with('/') {
        ensure!(Path::new(program).exists(), "{program} is missing");
        return Ok(PathBuf::from(program));
    }
    ["/usr/bin", "/bin", "/usr/sbin", "/sbin"]
        .iter()
        .map(|directory| Path::new(directory).join(program))
        .find(|path| path.exists())
        .with_context(|| format!("{program} is missing"))
}

/// What the dynamic loader would load, and the loader.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("ldd")?;
    // A static program or a script has none.
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}
