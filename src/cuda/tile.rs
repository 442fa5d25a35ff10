//! Which tile a product is made of: a function of its shape, and of whether the device is a Hopper.

/// Blocks that keep the largest device busy.
const BLOCKS: usize = 132;

/// Rows × columns of the output that one block makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tile {
    /// 64 × 64.
    Small,
    /// 128 × 128.
    Square,
    /// 128 × 256.
    Wide,
    /// 128 × 256, by blocks of warpgroups that stay and take tile after tile.
    Hopper,
}

impl Tile {
    /// Rows.
    pub fn rows(self) -> usize {
        if self == Tile::Small { 64 } else { 128 }
    }

    /// Columns.
    pub fn columns(self) -> usize {
        match self {
            Tile::Small => 64,
            Tile::Square => 128,
            Tile::Wide | Tile::Hopper => 256,
        }
    }

    /// Threads of a block.
    pub fn threads(self) -> usize {
        match self {
            Tile::Small | Tile::Square => 128,
            Tile::Wide => 256,
            Tile::Hopper => 384,
        }
    }

    /// Tiles of `rows` rows and outputs of `widths`, each with tiles of its own.
    pub fn count(self, rows: usize, widths: impl Iterator<Item = usize>) -> usize {
        rows.div_ceil(self.rows()) * widths.map(|w| w.div_ceil(self.columns())).sum::<usize>()
    }

    /// The largest tile of which there are enough for every multiprocessor: two rounds of the wide one, which has a
    /// multiprocessor to itself, or one of the square one. Few rows get the small one. Of Hopper's tiles half as many as
    /// multiprocessors are enough: its products by warpgroups run at twice the rate of those by warps.
    /// Each of its tiles lies in one of the `copies` of the `tokens` rows, and at least half of its rows should exist.
    pub fn choose(
        (tokens, copies): (usize, usize),
        widths: impl Iterator<Item = usize> + Clone,
        hopper: bool,
    ) -> Tile {
        let rows = tokens * copies;
        let of_hopper = || copies * Tile::Hopper.count(tokens, widths.clone());
        match () {
            () if rows <= Tile::Small.rows() => Tile::Small,
            () if hopper && 2 * tokens >= Tile::Hopper.rows() && of_hopper() >= BLOCKS / 2 => Tile::Hopper,
            () if Tile::Wide.count(rows, widths.clone()) >= 2 * BLOCKS => Tile::Wide,
            () if Tile::Square.count(rows, widths) >= BLOCKS => Tile::Square,
            () => Tile::Small,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(rows: usize, widths: &[usize]) -> Tile {
        Tile::choose((rows, 1), widths.iter().copied(), false)
    }

    #[test]
    fn large_products_get_large_tiles() {
        assert_eq!(of(8192, &[4096]), Tile::Wide);
        assert_eq!(of(8192, &[2048, 512, 512]), Tile::Wide);
        assert_eq!(of(8192, &[1024, 256, 256]), Tile::Wide);
        assert_eq!(of(2048, &[4096]), Tile::Square);
        assert_eq!(of(512, &[5734, 5734]), Tile::Square);
        assert_eq!(of(512, &[1024]), Tile::Small);
        assert_eq!(of(1, &[128_256]), Tile::Small);
        assert_eq!(of(0, &[1]), Tile::Small);
    }

    #[test]
    fn hopper_gets_its_own() {
        let copied = |rows, widths: &[usize]| Tile::choose(rows, widths.iter().copied(), true);
        let of = |rows, widths: &[usize]| copied((rows, 1), widths);
        assert_eq!(of(8192, &[4096]), Tile::Hopper);
        assert_eq!(of(2048, &[1024, 256, 256]), Tile::Hopper);
        assert_eq!(of(512, &[5734, 5734]), Tile::Hopper);
        assert_eq!(of(1024, &[2048]), Tile::Small);
        assert_eq!(of(64, &[128_256]), Tile::Small);
        assert_eq!(of(0, &[1]), Tile::Small);
        assert_eq!(copied((64, 100), &[4096]), Tile::Hopper);
        assert_eq!(copied((63, 100), &[4096]), Tile::Wide);
    }

    #[test]
    fn tiles_are_counted_for_each_output() {
        assert_eq!(Tile::Small.count(65, [65, 1].into_iter()), 6);
        assert_eq!(Tile::Wide.count(128, [256, 257].into_iter()), 3);
    }
}
