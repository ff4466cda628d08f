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

/// What the share of tested behaviours is counted over: the node's agent, the tunnel, the control plane, installation.
const COUNTED: [&str; 4] = ["C01-C85", "Z01-Z118", "D01-D80", "H01-H20"];

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
    let words = words(text);
    let mut found = BTreeSet::new();
    let mut of_traps = false;
    for (index, word) in words.iter().enumerate() {
        if let Some((series, first)) = split(word) {
            let last = match words.get(index + 1..index + 3) {
                Some(["-", to]) => split(to).filter(|(same, _)| *same == series).map_or(first, |it| it.1),
                _ => first,
            };
            found.extend((first..=last).map(|number| name(series, number)));
        }
        let number = word.parse::<usize>().ok();
        if let Some(number) = number.filter(|_| of_traps) {
            found.insert(name("TRAP", number));
        }
        let goes_on = of_traps && (number.is_some() || matches!(*word, "and" | ","));
        of_traps = goes_on || matches!(*word, "trap" | "traps" | "Trap" | "Traps");
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

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> Vec<String> {
        named(text).into_iter().collect()
    }

    #[test]
    fn ids_and_spans_are_found_in_prose() {
        assert_eq!(list("/// Z47, Z49: the pod's own (Z08)."), ["Z08", "Z47", "Z49"]);
        assert_eq!(list("Z58-Z60 hold"), ["Z58", "Z59", "Z60"]);
        assert_eq!(list("Z99-Z101, R29"), ["R29", "Z100", "Z101", "Z99"]);
        assert_eq!(list("C60-Z62"), ["C60", "Z62"], "no span over two series");
    }

    #[test]
    fn traps_are_found_in_words() {
        assert_eq!(list("Trap 14: only the endpoint"), ["TRAP14"]);
        assert_eq!(list("traps 11 and 12: each row, 7 of them"), ["TRAP11", "TRAP12"]);
        assert_eq!(list("TRAP3"), ["TRAP3"]);
        assert_eq!(list("a trap for 5"), Vec::<String>::new());
    }

    #[test]
    fn other_words_are_no_ids() {
        assert_eq!(list("z29_self_call Z4 AZ47 Z47b P256 X25519 Z1234 RFC7540 C_40"), Vec::<String>::new());
    }

    #[test]
    fn spans_are_expanded_and_others_refused() {
        assert_eq!(expand("Z01").unwrap(), ["Z01"]);
        assert_eq!(expand("TRAP9-TRAP11").unwrap(), ["TRAP9", "TRAP10", "TRAP11"]);
        for wrong in ["Z05-Z04", "Z01-C02", "1-2", "", "Q01"] {
            assert!(expand(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn all_are_there() {
        assert_eq!(every().len(), 590);
        assert!(
            is_counted("Z118")
                && is_counted("C34")
                && is_counted("D80")
                && !is_counted("W01")
                && !is_counted("R01")
        );
    }
}
