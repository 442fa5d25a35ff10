//! Drawings as inline SVG. Colours are CSS classes of the page, so that they follow its light or dark scheme.

use std::fmt::Write;

/// A line of a line chart.
pub struct Line {
    /// In the legend.
    pub name: String,
    /// Ascending in x.
    pub points: Vec<(f64, f64)>,
}

/// A value with an interval.
pub struct Dot {
    /// At the left.
    pub name: String,
    /// CSS class of the mark.
    pub class: String,
    /// Where the mark is.
    pub value: f64,
    /// Half the interval.
    pub half: f64,
}

/// A cell of a grid.
pub struct Cell {
    /// From the top.
    pub row: usize,
    /// From the left.
    pub column: usize,
    /// What is shown: a share of `most`, above zero in one colour, below in another.
    pub value: f64,
    /// Where a click leads in the page.
    pub link: Option<String>,
}

/// One direction that several updates share.
pub struct Direction {
    /// Its share of the energy.
    pub energy: f64,
    /// How far the updates disagree along it.
    pub conflict: f64,
    /// Of each update the cosine to the consensus, -1 to 1.
    pub cos: Vec<f64>,
    /// Of each update the part that is kept, 0 to 1.
    pub kept: Vec<f64>,
}

/// A stacked bar.
pub struct Bar {
    /// At the left.
    pub name: String,
    /// Name, size, and the size as text.
    pub parts: Vec<(String, f64, String)>,
}

const WIDTH: f64 = 760.0;
/// Points of a line beyond which it is thinned: more cannot be seen.
const MOST_POINTS: usize = 400;

/// A line chart with axes and a legend; nothing if there is no point.
pub fn lines(lines: &[Line], x_name: &str, y_name: &str) -> String {
    let all: Vec<(f64, f64)> = lines
        .iter()
        .flat_map(|l| &l.points)
        .copied()
        .filter(|p| p.0.is_finite() && p.1.is_finite())
        .collect();
    let Some((x0, x1, y0, y1)) = bounds(&all) else { return String::new() };
    let (left, top, bottom) = (54.0, 10.0, 40.0);
    let legend = 18.0 * lines.len().div_ceil(3) as f64;
    let (plot_h, height) = (240.0, 240.0 + top + bottom + legend);
    let plot_w = WIDTH - left - 12.0;
    let x = |v: f64| left + (v - x0) / (x1 - x0) * plot_w;
    let y = |v: f64| top + (y1 - v) / (y1 - y0) * plot_h;
    let mut s = open(WIDTH, height, &format!("{y_name} by {x_name}"));
    for tick in ticks(y0, y1) {
        let _ = write!(
            s,
            r#"<line class="grid" x1="{left}" x2="{:.1}" y1="{:.1}" y2="{:.1}"/><text class="tick end" x="{:.1}" y="{:.1}">{}</text>"#,
            left + plot_w,
            y(tick),
            y(tick),
            left - 6.0,
            y(tick) + 4.0,
            short(tick)
        );
    }
    for tick in ticks(x0, x1) {
        let _ = write!(
            s,
            r#"<text class="tick mid" x="{:.1}" y="{:.1}">{}</text>"#,
            x(tick),
            top + plot_h + 16.0,
            short(tick)
        );
    }
    let _ = write!(
        s,
        r#"<text class="tick mid" x="{:.1}" y="{:.1}">{}</text>"#,
        left + plot_w / 2.0,
        top + plot_h + 32.0,
        escape(x_name)
    );
    for (n, line) in lines.iter().enumerate() {
        let every = line.points.len().div_ceil(MOST_POINTS).max(1);
        let mut path = String::new();
        for (px, py) in line.points.iter().step_by(every).filter(|p| p.0.is_finite() && p.1.is_finite()) {
            let _ = write!(path, "{:.1},{:.1} ", x(*px), y(*py));
        }
        let colour = n % 8;
        let _ = write!(s, r#"<polyline class="line c{colour}" points="{}"/>"#, path.trim_end());
        let (lx, ly) = (left + 235.0 * (n % 3) as f64, top + plot_h + bottom + 12.0 + 18.0 * (n / 3) as f64);
        let _ = write!(
            s,
            r#"<line class="line c{colour}" x1="{lx}" x2="{:.1}" y1="{:.1}" y2="{:.1}"/><text class="tick" x="{:.1}" y="{ly}">{}</text>"#,
            lx + 18.0,
            ly - 4.0,
            ly - 4.0,
            lx + 24.0,
            escape(&line.name)
        );
    }
    s + "</svg>"
}

/// Marks with intervals on one scale, a row each.
pub fn dots(dots: &[Dot], low: f64, high: f64) -> String {
    let (left, row, top) = (190.0, 22.0, 22.0);
    let plot_w = WIDTH - left - 60.0;
    let x = |v: f64| left + (v.clamp(low, high) - low) / (high - low) * plot_w;
    let height = top + row * dots.len() as f64 + 8.0;
    let mut s = open(WIDTH, height, "accuracy of each adapter");
    for tick in ticks(low, high) {
        let _ = write!(
            s,
            r#"<line class="grid" x1="{:.1}" x2="{:.1}" y1="{top}" y2="{:.1}"/><text class="tick mid" x="{:.1}" y="14">{}</text>"#,
            x(tick),
            x(tick),
            height - 4.0,
            x(tick),
            short(tick)
        );
    }
    for (n, d) in dots.iter().enumerate() {
        let y = top + row * (n as f64 + 0.5);
        let _ = write!(
            s,
            r#"<text class="tick end" x="{:.1}" y="{:.1}">{}</text><line class="whisker {class}" x1="{:.1}" x2="{:.1}" y1="{y}" y2="{y}"/><circle class="dot {class}" cx="{:.1}" cy="{y}" r="5"/><text class="tick" x="{:.1}" y="{:.1}">{:.1}</text>"#,
            left - 10.0,
            y + 4.0,
            escape(&d.name),
            x(d.value - d.half),
            x(d.value + d.half),
            x(d.value),
            left + plot_w + 12.0,
            y + 4.0,
            d.value,
            class = escape(&d.class)
        );
    }
    s + "</svg>"
}

/// Values in a grid, stronger in colour the closer they are to `±most`.
pub fn grid(title: &str, cells: &[Cell], rows: &[String], columns: &[String], most: f64) -> String {
    let longest = rows.iter().map(|name| name.chars().count()).max().unwrap_or(0);
    let left = 20.0 + 7.0 * longest.min(24) as f64;
    let (top, w, h) =
        (24.0, if columns.len() > 8 { 58.0 } else { 92.0 }, if rows.len() > 16 { 16.0 } else { 28.0 });
    let mut s = open(left + w * columns.len() as f64, top + h * rows.len() as f64 + 4.0, title);
    for (n, name) in columns.iter().enumerate() {
        let _ = write!(
            s,
            r#"<text class="tick mid" x="{:.1}" y="16">{}</text>"#,
            left + w * (n as f64 + 0.5),
            escape(&cut(name, w))
        );
    }
    for (n, name) in rows.iter().enumerate() {
        let _ = write!(
            s,
            r#"<text class="tick end" x="{:.1}" y="{:.1}">{}</text>"#,
            left - 8.0,
            top + h * (n as f64 + 0.5) + 4.0,
            escape(&cut(name, left))
        );
    }
    for c in cells {
        let part = if most > 0.0 && c.value.is_finite() { (c.value / most).clamp(-1.0, 1.0) } else { 0.0 };
        if let Some(link) = &c.link {
            let _ = write!(s, r##"<a href="#{}">"##, escape(link));
        }
        let _ = write!(
            s,
            r#"<rect class="{}" x="{:.1}" y="{:.1}" width="{:.1}" height="{:.1}" style="--p:{:.3}"/><text class="tick mid {}" x="{:.1}" y="{:.1}">{:.3}</text>"#,
            if part < 0.0 { "heat below" } else { "heat" },
            left + w * c.column as f64 + 1.0,
            top + h * c.row as f64 + 1.0,
            w - 2.0,
            h - 2.0,
            part.abs(),
            if part.abs() > 0.55 { "over" } else { "on" },
            left + w * (c.column as f64 + 0.5),
            top + h * (c.row as f64 + 0.5) + 4.0,
            c.value
        );
        if c.link.is_some() {
            s += "</a>";
        }
    }
    s + "</svg>"
}

/// A row a direction: its energy, how far the updates disagree, and for each update (a colour each) the cosine to the
/// consensus and what is kept. Nothing if there is no direction.
pub fn directions(names: &[String], directions: &[Direction]) -> String {
    if directions.is_empty() {
        return String::new();
    }
    let (row, legend) = (24.0, 20.0 * names.len().div_ceil(4) as f64);
    let top = legend + 30.0;
    let (energy, cos, kept) = ((40.0, 150.0), (290.0, 250.0), (570.0, 160.0));
    let most = directions.iter().map(|d| d.energy).fold(0.0, f64::max);
    let height = top + row * directions.len() as f64 + 6.0;
    let mut s = open(WIDTH, height, "directions: energy, cosine to the consensus, what is kept");
    for (n, name) in names.iter().enumerate() {
        let (x, y) = (energy.0 + 180.0 * (n % 4) as f64, 12.0 + 20.0 * (n / 4) as f64);
        let _ = write!(
            s,
            r#"<circle class="fill c{}" cx="{x}" cy="{:.1}" r="5"/><text class="tick" x="{:.1}" y="{y}">{}</text>"#,
            n % 8,
            y - 4.0,
            x + 10.0,
            escape(&cut(name, 165.0))
        );
    }
    let heads = [
        (energy.0, "energy"),
        (energy.0 + energy.1 + 12.0, "conflict"),
        (cos.0, "cosine to the consensus, \u{2212}1 to 1"),
        (kept.0, "kept, 0 to 1"),
    ];
    for (x, head) in heads {
        let _ = write!(s, r#"<text class="tick" x="{x}" y="{:.1}">{head}</text>"#, legend + 18.0);
    }
    for (x, low) in [
        (cos.0, top),
        (cos.0 + cos.1 / 2.0, top),
        (cos.0 + cos.1, top),
        (kept.0, top),
        (kept.0 + kept.1, top),
    ] {
        let _ = write!(s, r#"<line class="grid" x1="{x}" x2="{x}" y1="{low}" y2="{height}"/>"#);
    }
    for (k, d) in directions.iter().enumerate() {
        let y = top + row * (k as f64 + 0.5);
        let length = if most > 0.0 { d.energy / most * energy.1 } else { 0.0 };
        let _ = write!(
            s,
            r#"<text class="tick end" x="{:.1}" y="{:.1}">{}</text><rect class="fill c7" x="{}" y="{:.1}" width="{length:.1}" height="12"><title>{:.2} % of the energy</title></rect><text class="tick" x="{:.1}" y="{:.1}">{:.3}</text>"#,
            energy.0 - 8.0,
            y + 4.0,
            k + 1,
            energy.0,
            y - 6.0,
            100.0 * d.energy,
            energy.0 + energy.1 + 12.0,
            y + 4.0,
            d.conflict
        );
        let mut mark = |n: usize, x: f64, value: f64| {
            // Marks of updates that agree would hide one another.
            let shift = 14.0 * ((n as f64 + 0.5) / names.len().max(1) as f64 - 0.5);
            let _ = write!(
                s,
                r#"<circle class="fill c{}" cx="{x:.1}" cy="{:.1}" r="4"><title>{} {value:.3}</title></circle>"#,
                n % 8,
                y + shift,
                names.get(n).map(|name| escape(name)).unwrap_or_default()
            );
        };
        for (n, &v) in d.cos.iter().enumerate() {
            mark(n, cos.0 + (v.clamp(-1.0, 1.0) + 1.0) / 2.0 * cos.1, v);
        }
        for (n, &v) in d.kept.iter().enumerate() {
            mark(n, kept.0 + v.clamp(0.0, 1.0) * kept.1, v);
        }
    }
    s + "</svg>"
}

/// `name` cut to what fits in `width`, in the middle: names of one run often begin alike.
fn cut(name: &str, width: f64) -> String {
    let (most, count) = ((width / 7.0).max(3.0) as usize, name.chars().count());
    if count <= most {
        return name.to_string();
    }
    let tail = (most - 1) / 2;
    name.chars().take(most - 1 - tail).chain(['…']).chain(name.chars().skip(count - tail)).collect()
}

/// Stacked bars on one scale, with a legend of the parts.
pub fn bars(bars: &[Bar]) -> String {
    let total = |b: &Bar| b.parts.iter().map(|p| p.1).sum::<f64>();
    let most = bars.iter().map(total).fold(0.0, f64::max);
    if most <= 0.0 {
        return String::new();
    }
    let mut names: Vec<&str> = Vec::new();
    for part in bars.iter().flat_map(|b| &b.parts) {
        if !names.contains(&part.0.as_str()) {
            names.push(&part.0);
        }
    }
    let (left, row) = (120.0, 34.0);
    let plot_w = WIDTH - left - 10.0;
    let legend = 20.0 * names.len().div_ceil(5) as f64;
    let mut s = open(WIDTH, row * bars.len() as f64 + legend + 8.0, "memory of training, by part");
    for (n, bar) in bars.iter().enumerate() {
        let y = row * n as f64 + 4.0;
        let _ = write!(
            s,
            r#"<text class="tick end" x="{:.1}" y="{:.1}">{}</text>"#,
            left - 10.0,
            y + 17.0,
            escape(&bar.name)
        );
        let mut x = left;
        for (name, size, text) in &bar.parts {
            let w = size / most * plot_w;
            let colour = names.iter().position(|n| n == name).unwrap_or(0) % 8;
            let _ = write!(
                s,
                r#"<rect class="fill c{colour}" x="{x:.1}" y="{y}" width="{w:.1}" height="24"><title>{} {}</title></rect>"#,
                escape(name),
                escape(text)
            );
            x += w;
        }
    }
    for (n, name) in names.iter().enumerate() {
        let (x, y) = (left + 125.0 * (n % 5) as f64, row * bars.len() as f64 + 16.0 + 20.0 * (n / 5) as f64);
        let _ = write!(
            s,
            r#"<rect class="fill c{}" x="{x}" y="{:.1}" width="12" height="12"/><text class="tick" x="{:.1}" y="{y}">{}</text>"#,
            n % 8,
            y - 10.0,
            x + 18.0,
            escape(name)
        );
    }
    s + "</svg>"
}

/// As wide as the page gives, within limits: larger letters help nobody, and smaller ones than these cannot be read, so
/// that a narrow page scrolls the drawing.
fn open(width: f64, height: f64, title: &str) -> String {
    format!(
        r#"<svg viewBox="0 0 {width:.0} {height:.0}" style="max-width:{:.0}px;min-width:{:.0}px" role="img" aria-label="{}" xmlns="http://www.w3.org/2000/svg">"#,
        1.1 * width,
        0.75 * width,
        escape(title)
    )
}

fn bounds(points: &[(f64, f64)]) -> Option<(f64, f64, f64, f64)> {
    let first = points.first()?;
    let mut b = (first.0, first.0, first.1.min(0.0), first.1);
    for p in points {
        b = (b.0.min(p.0), b.1.max(p.0), b.2.min(p.1), b.3.max(p.1));
    }
    let wide = |low: f64, high: f64| if high > low { (low, high) } else { (low, low + 1.0) };
    let ((x0, x1), (y0, y1)) = (wide(b.0, b.1), wide(b.2, b.3));
    Some((x0, x1, y0, y1))
}

/// About five round numbers from `low` to `high`.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 5.0;
    let unit = 10f64.powf(rough.log10().floor());
    let step =
        [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * unit).find(|s| *s >= rough).unwrap_or(unit * 10.0);
    let first = (low / step).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    (first..=last).take(20).map(|i| i as f64 * step).collect()
}

fn short(x: f64) -> String {
    let text = format!("{x:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

fn escape(s: &str) -> String {
    s.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_nothing_out_of_range_and_escapes() {
        let svg = lines(
            &[Line { name: "<a>".into(), points: vec![(1.0, 2.0), (2.0, f64::NAN), (3.0, 1.0)] }],
            "x",
            "y",
        );
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>"));
        assert!(svg.contains("&lt;a&gt;") && !svg.contains("NaN"));
        assert_eq!(lines(&[], "x", "y"), "");
        assert_eq!(ticks(0.0, 100.0), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!(short(0.1 + 0.2), "0.3");
        let cell =
            |column, value, link: Option<&str>| Cell { row: 0, column, value, link: link.map(String::from) };
        let names = ["a", "b", "c"].map(String::from);
        let cells = [cell(0, 0.25, Some("m-\"0")), cell(1, -0.125, None), cell(2, f64::NAN, None)];
        let svg = grid("t", &cells, &names[..1], &names, 0.25);
        assert!(
            svg.contains("--p:1.000") && svg.contains("0.250") && svg.contains(r##"<a href="#m-&quot;0">"##)
        );
        assert!(svg.contains("heat below") && svg.contains("--p:0.500") && svg.contains("--p:0.000"));
    }

    #[test]
    fn draws_a_mark_for_every_update_of_a_direction() {
        let one = Direction { energy: 0.75, conflict: 0.1, cos: vec![1.0, -1.0], kept: vec![0.9, 0.0] };
        let svg = directions(&["hum".into(), "<sc>".into()], &[one]);
        assert_eq!(svg.matches("<circle").count(), 2 + 4, "a legend and two marks each");
        assert!(svg.contains("&lt;sc&gt; -1.000") && svg.contains("75.00 % of the energy"));
        assert_eq!(directions(&[], &[]), "");
        assert_eq!(cut("a long name of an edge", 40.0), "a …ge");
        assert_eq!((cut("edge", 40.0), cut("an edge", 0.0)), ("edge".into(), "a…e".into()));
    }
}
