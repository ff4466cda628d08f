//! The ledger as a page of the book.

use std::fmt::Write as _;

use super::entries::{Ledger, Row};
use super::ids;

/// Titles, each with the ids below it.
const SECTIONS: &[(&str, &str)] = &[
    ("Enrolment", "C01-C34"),
    ("Rules in the pod", "C35-C49"),
    ("On the host", "C50-C59"),
    ("Between agent and proxy", "C60-C71"),
    ("Process, ports, lifecycle", "Z01-Z14"),
    ("HBONE", "Z15-Z28"),
    ("Where an outgoing connection goes", "Z29-Z45"),
    ("Inbound, in a tunnel", "Z46-Z54"),
    ("Inbound, plaintext", "Z55-Z57"),
    ("Authorization", "Z58-Z67"),
    ("Load balancing", "Z68-Z75"),
    ("DNS", "Z76-Z84"),
    ("Certificates", "Z85-Z93"),
    ("xDS", "Z94-Z102"),
    ("Telemetry", "Z103-Z111"),
    ("Administration", "Z112-Z113"),
    ("Sockets and settings", "Z114-Z118"),
    ("What the control plane sends", "D01-D16"),
    ("From objects to workloads and services", "D17-D30"),
    ("From policies to rules", "D31-D43"),
    ("Status", "D44-D48"),
    ("Authority", "D49-D56"),
    ("Waypoints that are made", "D57-D65"),
    ("Admission, leases, revisions", "D66-D70"),
    ("More clusters, and debugging", "D71-D80"),
    ("Bugs that others had", "R01-R30"),
    ("Traps", "TRAP1-TRAP22"),
];

const HEAD: &str = "\
# Behaviour

What users of an ambient mesh rely on, and the tests that would fail without it. Made from `e2e/behaviour.toml` by `xtask ledger
--write`; `make test` fails if a test named here is gone, does not name the behaviour, or did not run and pass.

`later` says why there is no test: because the behaviour is not built, or because what is built has none yet. `differs` says where this
mesh does something else on purpose; the tests are then of what it does. `not shown yet` is the part of a behaviour that its tests leave out.
";

/// The whole page.
pub fn write(ledger: &Ledger) -> String {
    let mut page = HEAD.to_owned();
    for &(title, span) in SECTIONS {
        let ids = ids::expand(span).expect("every span above is one");
        let rows: Vec<_> = ledger.rows.iter().filter(|(id, _)| ids.contains(id)).collect();
        if rows.is_empty() {
            continue;
        }
        let shown = rows.iter().filter(|(_, row)| !row.test.is_empty()).count();
        page += &format!("\n## {title}\n\n{shown} of {} have a test.\n\n", rows.len());
        page += "| id | behaviour | | how it is known |\n|---|---|---|---|\n";
        for (id, row) in rows {
            let tag = row.tag.map(|it| it.to_string()).unwrap_or_default();
            let _ = writeln!(page, "| {id} | {} | {tag} | {} |", cell(&row.is), cell(&known(row)));
        }
    }
    page += "\n## Waiting\n\n| ids | for what |\n|---|---|\n";
    for (ids, later) in &ledger.waiting {
        let _ = writeln!(page, "| {} | {} |", cell(ids), cell(later));
    }
    page
}

fn known(row: &Row) -> String {
    let mut parts = Vec::new();
    parts.extend(row.differs.as_ref().map(|it| format!("differs: {it}")));
    parts.extend(row.test.iter().map(|it| format!("`{it}`")));
    parts.extend(row.part.as_ref().map(|it| format!("not shown yet: {it}")));
    parts.extend(row.later.as_ref().map(|it| format!("later: {it}")));
    parts.join("<br>")
}

/// What would end the cell is written so that it does not.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::super::entries;
    use super::*;

    #[test]
    fn a_row_has_its_section_its_state_and_its_tests() {
        let (ledger, _) = entries::parse(
            r#"
            [rows]
            Z02 = { is = "a | b", tag = "core", test = ["p::lib::x", "p::lib::y"], differs = "why" }
            Z01 = { is = "c", tag = "expected", later = "not built" }
            Z03 = { is = "d", tag = "core", test = ["p::lib::z"], part = "half" }
            [[wait]]
            ids = ["W01-W77", "D01"]
            later = "waypoint"
            "#,
        )
        .unwrap();
        let page = write(&ledger);
        let body = page.split_once("## Process").unwrap().1;
        assert_eq!(
            body,
            ", ports, lifecycle\n\n2 of 3 have a test.\n\n| id | behaviour | | how it is known |\n|---|---|---|---|\n\
             | Z01 | c | expected | later: not built |\n\
             | Z02 | a \\| b | core | differs: why<br>`p::lib::x`<br>`p::lib::y` |\n\
             | Z03 | d | core | `p::lib::z`<br>not shown yet: half |\n\
             \n## Waiting\n\n| ids | for what |\n|---|---|\n| W01-W77, D01 | waypoint |\n"
        );
    }

    #[test]
    fn every_row_has_a_section() {
        for &(title, span) in SECTIONS {
            assert!(!ids::expand(span).unwrap().is_empty(), "{title}");
        }
    }
}
