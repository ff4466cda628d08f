//! The reference pages name everything that the code names.

use std::fs;

/// The text between two marks, wherever both are on one line of a source file.
fn names(file: &str, before: &str, after: &str) -> Vec<String> {
    let path = culvert_xtask::root().join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    // A call whose arguments begin on the next line is put on one.
    let text = text.split("(\n").map(str::trim_start).collect::<Vec<_>>().join("(");
    // Tests and comments have texts of their own.
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let found: Vec<String> = code
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .filter_map(|line| Some(line.split_once(before)?.1.split_once(after)?.0.to_owned()))
        .collect();
    assert!(!found.is_empty(), "{file} holds nothing between {before:?} and {after:?}");
    found
}

fn page(file: &str) -> String {
    let path = culvert_xtask::root().join("docs").join(file);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn holds_all(page_name: &str, names: impl IntoIterator<Item = String>) {
    let text = page(page_name);
    let missing: Vec<String> =
        names.into_iter().filter(|name| !text.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "docs/{page_name} does not name {missing:?}");
}

#[test]
fn every_reason_has_a_line() {
    let reasons = names("crates/model/src/outcome.rs", "=> \"", "\"");
    let (flags, reasons): (Vec<_>, Vec<_>) = reasons
        .into_iter()
        .partition(|name| name.chars().all(|c| c.is_ascii_uppercase() || "_2".contains(c)));
    assert!(reasons.len() > 20 && !flags.is_empty(), "{reasons:?} {flags:?}");
    holds_all("reference/reasons.md", reasons);
    holds_all("reference/reasons.md", flags);
}

#[test]
fn every_metric_has_a_line() {
    let tcp = names("ztunnel/src/observe/metrics.rs", "istio.register(\"", "\"");
    holds_all("operations/metrics.md", tcp.into_iter().map(|name| format!("istio_{name}")));
    let timed = names("ztunnel/src/observe/metrics.rs", "istio.register_with_unit(\"", "\"");
    holds_all("operations/metrics.md", timed.into_iter().map(|name| format!("istio_{name}_seconds")));
    let pods = names("ztunnel/src/observe/metrics.rs", "pods.register(\"", "\"");
    holds_all("operations/metrics.md", pods.into_iter().map(|name| format!("workload_manager_{name}")));
    for (file, prefix) in [
        ("gauges", "culvert"),
        ("gauges", "istio"),
        ("gauges", "tokio"),
        ("discovery", "istio"),
        ("limits", "culvert"),
    ] {
        let found = names(&format!("ztunnel/src/observe/{file}.rs"), &format!("{prefix}.register(\""), "\"");
        assert!(!found.is_empty(), "{file} {prefix}");
        holds_all("operations/metrics.md", found.into_iter().map(|name| format!("{prefix}_{name}")));
    }
    for (variable, prefix) in [("istio", "istio"), ("own", "culvert_waypoint"), ("xds", "istio_xds")] {
        let found = names("waypoint/src/observe/metrics.rs", &format!("{variable}.register(\""), "\"");
        holds_all("operations/metrics.md", found.into_iter().map(|name| format!("{prefix}_{name}")));
    }
    let controller = names("controller/src/metrics.rs", "mine.register(\"", "\"");
    holds_all(
        "operations/metrics.md",
        controller.into_iter().map(|name| format!("culvert_controller_{name}")),
    );
}

#[test]
fn every_limit_has_a_line() {
    let limits = names("ztunnel/src/observe/limits.rs", "=> \"", "\"");
    assert!(limits.len() > 10, "{limits:?}");
    holds_all("operations/limits.md", limits);
}

#[test]
fn every_field_of_the_access_log_has_a_line() {
    for (file, at_least) in [
        ("ztunnel/src/observe/access_log.rs", 15),
        ("waypoint/src/observe/request.rs", 15),
        ("waypoint/src/observe/stream.rs", 10),
        ("waypoint/src/observe/mod.rs", 0),
    ] {
        let before = if file.ends_with("mod.rs") { "        " } else { "            " };
        let mut fields = names(file, before, " = ");
        fields.retain(|name| name.chars().all(|c| c.is_ascii_lowercase() || "._".contains(c)));
        assert!(fields.len() > at_least, "{file}: {fields:?}");
        holds_all("operations/access-log.md", fields);
    }
}

#[test]
fn every_variable_of_the_proxy_the_agent_and_the_waypoint_has_a_line() {
    for file in [
        "ztunnel/src/config.rs",
        "ztunnel/src/bounds.rs",
        "ztunnel/src/agent/mod.rs",
        "ztunnel/src/main.rs",
        "waypoint/src/config.rs",
        "waypoint/src/main.rs",
    ] {
        holds_all("operations/flags.md", names(file, "env = \"", "\""));
    }
}

#[test]
fn every_flag_of_the_controller_and_the_agent_has_a_line() {
    for file in ["controller/src/args.rs", "ztunnel/src/agent/mod.rs"] {
        let mut flags = names(file, "    pub ", ": ");
        // Groups of flags have no line of their own: what is in them has.
        flags.retain(|name| {
            !["ports", "kubernetes"].contains(&name.as_str())
                && name.chars().all(|c| c.is_ascii_lowercase() || c == '_')
        });
        assert!(flags.len() > 5, "{file}: {flags:?}");
        holds_all(
            "operations/flags.md",
            flags.into_iter().map(|name| format!("--{}", name.replace('_', "-"))),
        );
    }
    let named = names("ztunnel/src/agent/admin.rs", "#[arg(long = \"", "\"");
    holds_all("operations/flags.md", named.into_iter().map(|name| format!("--{name}")));
}

#[test]
fn every_label_has_a_line() {
    let path = culvert_xtask::root().join("crates/k8s-api/src/labels.rs");
    let text = fs::read_to_string(path).unwrap();
    let labels: Vec<_> = text
        .lines()
        .filter_map(|line| line.split_once(": &str = \"")?.1.split_once('"'))
        .map(|it| it.0)
        .collect();
    assert!(labels.len() > 20);
    holds_all("reference/labels.md", labels.into_iter().filter(|it| it.contains('/')).map(str::to_owned));
}
