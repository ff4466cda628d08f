//! Columns as kubectl prints them.

/// Rows under a heading, each column as wide as its widest cell and three spaces.
pub(crate) fn render(heading: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([heading[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heading.len()).map(width).collect();
    let heading = heading.iter().map(ToString::to_string).collect::<Vec<_>>();
    [&heading]
        .into_iter()
        .chain(rows)
        .map(|row| {
            let line: String =
                row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}   ")).collect();
            line.trim_end().to_owned() + "\n"
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["long name".to_owned(), String::new()]];
        assert_eq!(render(&["NAME", "N"], &rows), "NAME        N\na           1\nlong name\n");
    }
}
