//! `culvert get`: what proxies know and hold, in the columns that users of ambient know (K01 to K06).

use std::process::ExitCode;

use anyhow::Context;
use serde::Serialize;
use serde_json::Value;

use crate::args::{GetArgs, Mesh, What};
use crate::output::{List, Output, Table};
use source::{Answer, Source};

mod rows;
pub(crate) mod source;

/// What is listed, as data and as a table.
struct Listing {
    kind: &'static str,
    items: Vec<Value>,
    table: Table,
}

/// Which rows are wanted.
#[derive(Clone, Debug, Default)]
struct Filter {
    /// Of this namespace; `None` for all.
    namespace: Option<String>,
    name: Option<String>,
    address: Option<std::net::IpAddr>,
    direction: Option<&'static str>,
}

/// What `-o json` prints of all at once.
#[derive(Serialize)]
struct Everything<'a> {
    #[serde(rename = "apiVersion")]
    api_version: &'static str,
    kind: &'static str,
    lists: Vec<List<&'a Value>>,
}

/// The kinds, in the order of `all`.
const KINDS: [What; 6] =
    [What::Workloads, What::Services, What::Policies, What::Certificates, What::Connections, What::Proxies];

pub(crate) fn get(args: &GetArgs) -> anyhow::Result<ExitCode> {
    let (source, home) = match &args.file {
        Some(file) => (Source::file(file)?, None),
        None => match args.mesh.choose()? {
            Mesh::Local(state) => (Source::local(&state)?, Some("default".to_owned())),
            Mesh::Cluster(cluster) => {
                let source = Source::cluster(&cluster)?;
                let home = source.namespace();
                (source, home)
            }
        },
    };
    let filter = filter(args, home);
    let kinds = if args.what == What::All { KINDS.to_vec() } else { vec![args.what] };
    let mut failed = false;
    let mut listings = Vec::new();
    for what in kinds {
        let answers =
            source.ask(what, args.node.as_deref()).with_context(|| format!("{what:?}").to_lowercase())?;
        for Answer { from, outcome, .. } in &answers {
            if let Err(why) = outcome {
                eprintln!("warning: {from}: {why}");
                failed = true;
            }
        }
        listings.push(rows::listing(what, &answers, &filter));
    }
    show(args, &filter, &listings)?;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn filter(args: &GetArgs, home: Option<String>) -> Filter {
    let (in_name, name) = match args.name.as_deref().map(|name| name.split_once('/').ok_or(name)) {
        Some(Ok((namespace, name))) => (Some(namespace.to_owned()), Some(name.to_owned())),
        Some(Err(name)) => (None, Some(name.to_owned())),
        None => (None, None),
    };
    // An address is one workload's, whatever its namespace.
    let home = home.filter(|_| !args.all_namespaces && args.address.is_none());
    Filter {
        namespace: in_name.or_else(|| args.namespace.clone()).or(home),
        name,
        address: args.address,
        direction: args.direction.map(|it| match it {
            crate::args::Direction::Inbound => "inbound",
            crate::args::Direction::Outbound => "outbound",
        }),
    }
}

fn show(args: &GetArgs, filter: &Filter, listings: &[Listing]) -> anyhow::Result<()> {
    let lists = || listings.iter().map(|it| List::new(it.kind, it.items.iter().collect::<Vec<_>>()));
    let data = match listings {
        [one] if args.what != What::All => {
            args.output.data(&List::new(one.kind, one.items.iter().collect::<Vec<_>>()))?
        }
        _ => args.output.data(&Everything {
            api_version: crate::output::API_VERSION,
            kind: "Everything",
            lists: lists().collect(),
        })?,
    };
    if let Some(data) = data {
        print!("{data}");
        return Ok(());
    }
    let mut first = true;
    for listing in listings {
        if listing.table.is_empty() {
            if args.what != What::All {
                let place = filter.namespace.as_ref().map(|it| format!(" in namespace {it} (-A shows all)"));
                eprintln!(
                    "No {} found{}.",
                    format!("{:?}", args.what).to_lowercase(),
                    place.unwrap_or_default()
                );
            }
            continue;
        }
        let text = listing.table.render(args.output == Output::Wide);
        let text = if args.no_headers {
            text.split_once('\n').map_or("", |(_, rows)| rows).to_owned()
        } else {
            text
        };
        print!("{}{text}", if std::mem::take(&mut first) { "" } else { "\n" });
    }
    Ok(())
}
