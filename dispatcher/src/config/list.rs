//! Lists of small numbers as the kernel writes them: `2-5,7`.

use std::fmt::Write as _;

/// Why a text is not a list of numbers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListError {
    /// A part is neither a number nor a range.
    #[error("`{0}` is neither a number nor a range such as 2-5")]
    NotANumber(String),
    /// A range runs backwards.
    #[error("the range `{0}` runs backwards")]
    Backwards(String),
    /// A number exceeds the limit.
    #[error("{found} is larger than {max}")]
    TooLarge {
        /// The number found.
        found: usize,
        /// The largest number allowed.
        max: usize,
    },
}

/// Reads a list such as `2-5,7`. Order and repetitions are kept.
///
/// # Errors
///
/// A part is neither a number nor a forward range, or a number exceeds `max`.
pub fn parse_list(text: &str, max: usize) -> Result<Vec<usize>, ListError> {
    let mut numbers = Vec::new();
    for part in text.split(',').map(str::trim) {
        let number = |digits: &str| -> Result<usize, ListError> {
            let found = digits.trim().parse().map_err(|_| ListError::NotANumber(part.to_owned()))?;
            if found > max { Err(ListError::TooLarge { found, max }) } else { Ok(found) }
        };
        match part.split_once('-') {
            None => numbers.push(number(part)?),
            Some((first, last)) => {
                let (first, last) = (number(first)?, number(last)?);
                if first > last {
                    return Err(ListError::Backwards(part.to_owned()));
                }
                numbers.extend(first..=last);
            }
        }
    }
    Ok(numbers)
}

/// Writes numbers as [`parse_list`] reads them; three or more in a row become a range.
#[must_use]
pub fn format_list(numbers: &[usize]) -> String {
    let mut text = String::new();
    let mut rest = numbers;
    while let Some(&first) = rest.first() {
        let run =
            rest.iter().enumerate().take_while(|&(step, &n)| first.checked_add(step) == Some(n)).count();
        let run = if run < 3 { 1 } else { run };
        if !text.is_empty() {
            text.push(',');
        }
        let _ = if run == 1 { write!(text, "{first}") } else { write!(text, "{first}-{}", rest[run - 1]) };
        rest = &rest[run..];
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_and_ranges_keep_their_order() {
        assert_eq!(parse_list("7, 2-5,7", 9), Ok(vec![7, 2, 3, 4, 5, 7]));
        assert_eq!(format_list(&[7, 2, 3, 4, 5, 8, 9]), "7,2-5,8,9");
        assert_eq!(format_list(&[]), "");
    }

    #[test]
    fn a_wrong_part_is_named() {
        assert_eq!(parse_list("1,x", 9), Err(ListError::NotANumber("x".into())));
        assert_eq!(parse_list("", 9), Err(ListError::NotANumber(String::new())));
        assert_eq!(parse_list("1,", 9), Err(ListError::NotANumber(String::new())));
        assert_eq!(parse_list("-3", 9), Err(ListError::NotANumber("-3".into())));
        assert_eq!(parse_list("5-2", 9), Err(ListError::Backwards("5-2".into())));
        assert_eq!(parse_list("0-99", 9), Err(ListError::TooLarge { found: 99, max: 9 }));
        assert_eq!(
            parse_list("99999999999999999999999", 9),
            Err(ListError::NotANumber("99999999999999999999999".into()))
        );
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(numbers in prop::collection::vec(0usize..64, 1..40)) {
            prop_assert_eq!(parse_list(&format_list(&numbers), 63), Ok(numbers));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "[0-9,\\- x]{0,24}") {
            if let Ok(numbers) = parse_list(&text, 512) {
                prop_assert!(!numbers.is_empty() && numbers.iter().all(|&n| n <= 512));
            }
        }
    }
}
