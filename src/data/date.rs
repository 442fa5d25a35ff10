//! The date for chat templates: `strftime` of a moment in UTC.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// The moment that templates take for now: `SOURCE_DATE_EPOCH` (seconds since 1970) where it is set, so that a run
/// can be repeated on another day, else the clock.
pub fn now() -> SystemTime {
    let fixed = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|s| s.parse().ok());
    fixed
        .and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)))
        .unwrap_or_else(SystemTime::now)
}

/// `format` with the conversions `% a A b B d e H I j m M p S y Y %` filled in; `None` names no other.
pub fn strftime(format: &str, at: SystemTime) -> Result<String, String> {
    let seconds = at.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, clock) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (clock / 3600, clock / 60 % 60, clock % 60);
    // 1970-01-01 was a Thursday.
    let weekday = DAYS[((days + 3) % 7) as usize];
    let name = MONTHS[month - 1];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let conversion = chars.next();
        let written = match conversion {
            Some('Y') => write!(out, "{year}"),
            Some('y') => write!(out, "{:02}", year % 100),
            Some('m') => write!(out, "{month:02}"),
            Some('d') => write!(out, "{day:02}"),
            Some('e') => write!(out, "{day:2}"),
            Some('j') => write!(out, "{:03}", day_of_year(year, month, day)),
            Some('H') => write!(out, "{hour:02}"),
            Some('I') => write!(out, "{:02}", (hour + 11) % 12 + 1),
            Some('M') => write!(out, "{minute:02}"),
            Some('S') => write!(out, "{second:02}"),
            Some('p') => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
            Some('B') => write!(out, "{name}"),
            Some('b') => write!(out, "{}", &name[..3]),
            Some('A') => write!(out, "{weekday}"),
            Some('a') => write!(out, "{}", &weekday[..3]),
            Some('%') => write!(out, "%"),
            other => {
                let text: String = other.into_iter().collect();
                return Err(format!("strftime_now: conversion %{text} is not known"));
            }
        };
        written.map_err(|e| e.to_string())?;
    }
    Ok(out)
}

/// Year, month (1..) and day (1..) of a day counted from 1970-01-01.
fn civil(days: u64) -> (u64, usize, u64) {
    let (mut year, mut left) = (1970, days);
    // 400 years are 146,097 days; what is left is walked year by year.
    year += left / 146_097 * 400;
    left %= 146_097;
    while left >= year_days(year) {
        left -= year_days(year);
        year += 1;
    }
    let mut month = 1;
    while left >= month_days(year, month) {
        left -= month_days(year, month);
        month += 1;
    }
    (year, month, left + 1)
}

fn day_of_year(year: u64, month: usize, day: u64) -> u64 {
    (1..month).map(|m| month_days(year, m)).sum::<u64>() + day
}

fn leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn year_days(year: u64) -> u64 {
    if leap(year) { 366 } else { 365 }
}

fn month_days(year: u64, month: usize) -> u64 {
    match month {
        2 => 28 + u64::from(leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64, format: &str) -> String {
        strftime(format, UNIX_EPOCH + Duration::from_secs(seconds)).unwrap()
    }

    #[test]
    fn known_moments() {
        assert_eq!(at(0, "%Y-%m-%d %H:%M:%S %a"), "1970-01-01 00:00:00 Thu");
        // date -u -d @951782400: Tue Feb 29 00:00:00 UTC 2000
        assert_eq!(at(951_782_400, "%d %b %Y %A %j"), "29 Feb 2000 Tuesday 060");
        // date -u -d @1721989805
        assert_eq!(at(1_721_989_805, "%d %B %y %I:%M:%S %p 100%%"), "26 July 24 10:30:05 AM 100%");
        assert_eq!(at(4_102_444_799, "%Y-%m-%e %H"), "2099-12-31 23");
        assert!(strftime("%Q", UNIX_EPOCH).is_err());
        assert!(strftime("%", UNIX_EPOCH).is_err());
    }
}
