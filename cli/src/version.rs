//! `culvert version`: of this program, of the control plane and of the proxies that are connected (K26).

use std::collections::BTreeMap;
use std::process::ExitCode;

use serde::Serialize;
use serde_json::Value;

use crate::args::{Mesh, VersionArgs, What};
use crate::get::source::{Answer, Source};
use crate::output::API_VERSION;

/// What `-o json` prints.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Versions {
    api_version: &'static str,
    kind: &'static str,
    /// Of this program.
    client: &'static str,
    /// Of controllers: version to their number.
    #[serde(skip_serializing_if = "Option::is_none")]
    control_plane: Option<BTreeMap<String, usize>>,
    /// Of proxies that are connected: version to their number.
    #[serde(skip_serializing_if = "Option::is_none")]
    data_plane: Option<BTreeMap<String, usize>>,
}

pub(crate) fn version(args: &VersionArgs) -> anyhow::Result<ExitCode> {
    let mut failed = false;
    let answers = if args.client { Ok(Vec::new()) } else { ask(args) };
    let versions = match answers {
        Ok(answers) => {
            for Answer { from, outcome, .. } in &answers {
                if let Err(why) = outcome {
                    eprintln!("warning: {from}: {why}");
                    failed = true;
                }
            }
            Versions::new(&answers)
        }
        // That of this program can be said in any case.
        Err(error) => {
            eprintln!("warning: {error:#}");
            failed = true;
            Versions::new(&[])
        }
    };
    match args.output.data(&versions)? {
        Some(data) => print!("{data}"),
        None => print!("{}", versions.page()),
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn ask(args: &VersionArgs) -> anyhow::Result<Vec<Answer>> {
    let source = match args.mesh.choose()? {
        Mesh::Local(state) => Source::local(&state)?,
        Mesh::Cluster(cluster) => Source::cluster(&cluster)?,
    };
    source.ask(What::Proxies, None)
}

impl Versions {
    fn new(answers: &[Answer]) -> Self {
        let pages = || answers.iter().filter_map(|answer| answer.outcome.as_ref().ok());
        let count = |versions: &mut dyn Iterator<Item = &Value>| {
            let mut counts: BTreeMap<String, usize> = BTreeMap::new();
            for version in versions {
                let version = version.as_str().filter(|it| !it.is_empty()).unwrap_or("unknown");
                *counts.entry(version.to_owned()).or_default() += 1;
            }
            counts
        };
        let proxies = |page: &'static str| move |of: &Value| of[page].as_array().cloned().unwrap_or_default();
        let connected: Vec<Value> = pages().flat_map(proxies("proxies")).collect();
        let asked = !answers.is_empty();
        Self {
            api_version: API_VERSION,
            kind: "Versions",
            client: env!("CARGO_PKG_VERSION"),
            control_plane: asked.then(|| count(&mut pages().map(|page| &page["version"]))),
            data_plane: asked.then(|| count(&mut connected.iter().map(|proxy| &proxy["version"]))),
        }
    }

    fn page(&self) -> String {
        let list = |counts: &BTreeMap<String, usize>, what: &str| {
            let parts = counts.iter().map(|(version, count)| format!("{version} ({count} {what})"));
            let parts: Vec<_> = parts.collect();
            if parts.is_empty() { "none".to_owned() } else { parts.join(", ") }
        };
        let mut page = format!("client version: {}\n", self.client);
        if let Some(counts) = &self.control_plane {
            page += &format!("control plane version: {}\n", list(counts, "controllers"));
        }
        if let Some(counts) = &self.data_plane {
            page += &format!("data plane version: {}\n", list(counts, "proxies"));
        }
        page
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// K26.
    #[test]
    fn proxies_are_counted_by_version() {
        let page = json!({"version": "1.2.0", "proxies": [{"version": "1.2.0"}, {"version": "1.1.0"}, {"version": "1.2.0"}, {}]});
        let answers = vec![
            Answer { from: "c-1".into(), node: String::new(), outcome: Ok(page) },
            Answer { from: "c-2".into(), node: String::new(), outcome: Err("away".into()) },
        ];
        let text = Versions::new(&answers).page();
        assert!(text.contains("control plane version: 1.2.0 (1 controllers)\n"), "{text}");
        assert!(
            text.contains("data plane version: 1.1.0 (1 proxies), 1.2.0 (2 proxies), unknown (1 proxies)\n"),
            "{text}"
        );
        let alone = Versions::new(&[]);
        assert_eq!((alone.control_plane.is_none(), alone.page().lines().count()), (true, 1));
    }
}
