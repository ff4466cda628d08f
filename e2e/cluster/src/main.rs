//! `cluster`: a real two-node Kubernetes on this machine, for people. `make cluster` calls it.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use culvert_cluster::files::{self, Files};
use culvert_cluster::images::Image;
use culvert_cluster::{Cluster, Programs};

/// A real two-node Kubernetes on this machine. Root is needed.
#[derive(Debug, Parser)]
#[command(name = "cluster")]
struct Cli {
    /// Where everything of it is kept.
    #[arg(long, env = "CULVERT_CLUSTER", default_value = files::DEFAULT)]
    dir: PathBuf,
    /// The programs of Kubernetes, built by `make cluster-programs`.
    #[arg(long, env = "KUBERNETES_BIN", default_value = "target/k8s/bin")]
    programs: PathBuf,
    #[command(subcommand)]
    command: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Start it, in place of one that runs.
    Up,
    /// End it and remove all that is left.
    Down,
    /// Run a command where the API server can be reached, with KUBECONFIG set.
    Exec {
        #[arg(trailing_var_arg = true, required = true)]
        command: Vec<String>,
    },
    /// Run kubectl.
    Kubectl {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run a command on a node.
    Node {
        name: String,
        #[arg(trailing_var_arg = true, required = true)]
        command: Vec<String>,
    },
    /// Cut a node's power, and turn it on again.
    Reboot { name: String },
    /// Write the image archive of a static program: NAME as registry/path:tag.
    Image { name: String, program: PathBuf, archive: PathBuf },
    /// Make the image of a static program and bring it to every node.
    Load { name: String, program: PathBuf },
    /// Bring image archives to every node.
    Import {
        #[arg(required = true)]
        archives: Vec<PathBuf>,
    },
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let files = Files::new(&cli.dir);
    let open = || Cluster::open(&files, Programs::new(&cli.programs)?);
    match &cli.command {
        Action::Up => {
            Cluster::up(&files, Programs::new(&cli.programs)?)?;
            println!("two nodes are ready; state and logs are in {}", cli.dir.display());
            Ok(())
        }
        Action::Down => Cluster::down(&files),
        Action::Exec { command } => bail!(open()?.api().command(&command[0]).args(&command[1..]).exec()),
        Action::Kubectl { args } => bail!(open()?.api().command("kubectl").args(args).exec()),
        Action::Node { name, command } => {
            bail!(open()?.node(name)?.command(&command[0])?.args(&command[1..]).exec())
        }
        Action::Reboot { name } => {
            let cluster = open()?;
            cluster.node(name)?.cut_power()?;
            cluster.node(name)?.power_on()
        }
        Action::Image { name, program, archive } => {
            let scratch = archive.with_extension("scratch");
            Image::of_program(name, program).write(&scratch, archive)
        }
        Action::Load { name, program } => {
            let cluster = open()?;
            let archive = files.at("image.tar");
            Image::of_program(name, program).write(&files.at("image"), &archive)?;
            cluster.import(&archive)?;
            Ok(std::fs::remove_file(archive)?)
        }
        Action::Import { archives } => {
            let cluster = open()?;
            archives.iter().try_for_each(|archive| cluster.import(archive))
        }
    }
}
