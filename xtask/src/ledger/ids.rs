//! Ids of behaviours: which there are, and which of them a text names.

use std::collections::BTreeSet;

use anyhow::{Context, ensure};

/// Every series of ids and its last number; the first is 1. C and Z: node and tunnel. W: waypoint. D: control plane. K: command
/// line. H: installation. T: tests of others. U: complaints. R: bugs that others had. TRAP: what is easily got wrong.
const SERIES: [(&str, usize); 10] = [
    ("C", 85),
    ("Z", 118),
    ("W", 77),
    ("D", 80),
    ("K", 31),
    ("H", 20),
    ("T", 70),
    ("U", 57),
    ("R", 30),
    ("TRAP", 22),
];

/// What the share of tested behaviours is counted over: rules in the pod, the node-agent protocol, the tunnel.
const COUNTED: [&str; 3] = ["C35-C49", "C60-C71", "Z01-Z118"];

/// Every id there is, in order.
pub fn every() -> Vec<String> {
    SERIES.iter().flat_map(|(series, last)| (1..=*last).map(move |number| name(series, number))).collect()
}

/// Whether its state counts in the share of tested behaviours.
pub fn is_counted(id: &str) -> bool {
    COUNTED.iter().any(|span| expand(span).is_ok_and(|ids| ids.iter().any(|it| it == id)))
}

/// `Z01`, or each of `Z01-Z03`.
///
/// # Errors
/// If it is neither, or runs backwards.
pub fn expand(span: &str) -> anyhow::Result<Vec<String>> {
    let (from, to) = span.split_once('-').unwrap_or((span, span));
    let (series, first) = split(from).context("no id")?;
    let (other, last) = split(to).context("no id")?;
    ensure!(series == other && first <= last, "not a span");
    Ok((first..=last).map(|number| name(series, number)).collect())
}

/// The ids that a text names: `Z47`, spans such as `Z58-Z64`, and `trap 5` or `traps 11 and 12` in words.
pub fn named(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut before: Option<(&str, usize)> = None;
    let mut trap = false;
    for word in words(text) {
        let here = split(word);
        if let Some((series, number)) = here {
            let first = match before {
                Some((same, first)) if same == series => first,
                _ => number,
            };
            found.extend((first.min(number)..=number).map(|number| name(series, number)));
        }
        if trap && let Ok(number) = word.parse() {
            found.insert(name("TRAP", number));
        }
        trap = matches!(word, "trap" | "traps" | "Trap" | "Traps")
            || trap && (word == "and" || word == "," || word.parse::<usize>().is_ok());
        before = match word {
            "-" => before,
            _ => here,
        };
        // A span needs its hyphen: two ids in a row are two ids.
        if word == "-" {
            continue;
        }
        if let Some((series, number)) = here {
            before = Some((series, number));
        }
    }
    found
}

/// Words of letters and digits, and each hyphen and comma; all else separates.
fn words(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = if first.is_alphanumeric() || first == '_' {
            rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())
        } else {
            first.len_utf8()
        };
        let (word, after) = rest.split_at(length);
        if first.is_alphanumeric() || matches!(first, '-' | ',') {
            found.push(word);
        }
        rest = after;
    }
    found
}

/// The series and number of an id that exists or could.
fn split(word: &str) -> Option<(&'static str, usize)> {
    let digits = word.find(|c: char| c.is_ascii_digit())?;
    let (letters, number) = word.split_at(digits);
    let (series, _) = SERIES.iter().find(|(series, _)| *series == letters)?;
    let long_enough = number.len() >= 2 || *series == "TRAP";
    (long_enough && number.len() <= 3).then(|| number.parse().ok()).flatten().map(|number| (*series, number))
}

fn name(series: &str, number: usize) -> String {
    if series == "TRAP" { format!("{series}{number}") } else { format!("{series}{number:02}") }
}
