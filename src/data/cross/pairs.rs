//! Which question of one domain meets which of another, in what order.

use std::sync::Arc;

use super::sources::{Pool, Source};
use crate::checkpoint::digest;
use crate::error::{Error, Result};
use crate::random::{Philox, Purpose};

/// Two domains whose questions are paired.
#[derive(Clone, Debug)]
pub struct Pair {
    /// Their questions.
    pub pools: [Arc<Pool>; 2],
    /// A permutation of each.
    orders: [Vec<usize>; 2],
    seed: u64,
    /// Names the pair's streams of random numbers.
    index: u64,
}

impl Pair {
    /// The pairs of `pools`, in the order that `seed` decides. It depends on the domains' names and on nothing of the
    /// other pairs.
    pub fn new(seed: u64, pools: [&Arc<Pool>; 2]) -> Pair {
        let hash = digest::sha256(format!("{}\0{}", pools[0].domain, pools[1].domain).as_bytes());
        // 56 bits, of which a stream's number has room.
        let index = hash
            .bytes()
            .take(14)
            .fold(0, |n, digit| n << 4 | u64::from((digit as char).to_digit(16).unwrap_or(0)));
        let order = |side: usize| {
            let random = Philox::new(seed, Purpose::Pairing.stream(index)).at_step(side as u64);
            random.permutation(pools[side].sources.len())
        };
        Pair { pools: pools.map(Arc::clone), orders: [order(0), order(1)], seed, index }
    }

    /// The two domains.
    pub fn domains(&self) -> [&str; 2] {
        self.pools.each_ref().map(|p| p.domain.as_str())
    }

    /// The pair's name in files and ids: the domains in lower case, anything but letters and digits as `_`, and `-`
    /// between them.
    pub fn name(&self) -> String {
        let plain = |c: char| if c.is_alphanumeric() { c.to_ascii_lowercase() } else { '_' };
        self.domains().map(|d| d.trim().chars().map(plain).collect::<String>()).join("-")
    }

    /// How many candidates there are: every question of the first with every one of the second.
    pub fn len(&self) -> u64 {
        self.orders.iter().map(|o| o.len() as u64).product()
    }

    /// Whether there is no candidate.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Candidate `k` below [`Pair::len`]; no two are the same, and all questions of a domain come up equally often.
    ///
    /// With n and m questions it is (k mod n, (k + ⌊k / lcm⌋) mod m) under the permutations: lcm(n, m) steps visit the
    /// pairs whose places differ by a multiple of gcd(n, m), and each round of that length is shifted by one.
    pub fn candidate(&self, k: u64) -> [&Source; 2] {
        let [n, m] = self.orders.each_ref().map(|o| o.len() as u64);
        let places = [k % n, (k + k / (n / gcd(n, m) * m)) % m];
        [0, 1].map(|side| &self.pools[side].sources[self.orders[side][places[side] as usize]])
    }

    /// Where the written options stand of the accepted item number `accepted`, candidate `k`: a permutation, `order[i]`
    /// being the written option at place i. The right one, `gold`, comes to each place once in four accepted items.
    pub fn shuffle(&self, accepted: u64, k: u64, gold: usize) -> [usize; 4] {
        let random = Philox::new(self.seed, Purpose::Options.stream(self.index));
        let place = random.at_step(accepted / 4 * 2).permutation(4)[(accepted % 4) as usize];
        let others: Vec<usize> = (0..4).filter(|&i| i != gold).collect();
        let drawn = random.at_step(k * 2 + 1).permutation(3);
        let mut rest = drawn.into_iter().map(|i| others[i]);
        [0, 1, 2, 3].map(|at| if at == place { gold } else { rest.next().unwrap_or(gold) })
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The pairs named in `asked` (all of the pools if it is empty), each in the order given.
///
/// It is an error if a domain has no questions, a pair is of one domain or is asked for twice, two have one name, or
/// there is no pair.
pub fn pairs(pools: &[Arc<Pool>], asked: &[[String; 2]], seed: u64) -> Result<Vec<Pair>> {
    let find = |domain: &String| {
        pools.iter().find(|p| p.domain == *domain).ok_or_else(|| {
            let known: Vec<&str> = pools.iter().map(|p| p.domain.as_str()).collect();
            Error::Usage(format!("no source is of the domain {domain:?}: there are {}", known.join(", ")))
        })
    };
    let mut pairs = Vec::new();
    for [a, b] in asked {
        if a == b {
            return Err(Error::Usage(format!("--pair {a},{b}: a pair is of two domains")));
        }
        pairs.push(Pair::new(seed, [find(a)?, find(b)?]));
    }
    if asked.is_empty() {
        for (n, a) in pools.iter().enumerate() {
            pairs.extend(pools[n + 1..].iter().map(|b| Pair::new(seed, [a, b])));
        }
    }
    if pairs.is_empty() {
        let found = pools.iter().map(|p| p.domain.as_str()).collect::<Vec<_>>().join(", ");
        return Err(Error::Usage(format!("the sources are of one domain ({found}), expected two or more")));
    }
    for (n, pair) in pairs.iter().enumerate() {
        let [a, b] = pair.domains();
        if pairs[..n].iter().any(|p| p.domains() == [a, b] || p.domains() == [b, a]) {
            return Err(Error::Usage(format!("--pair {} is given twice", pair.domains().join(","))));
        }
        // The longest name of a file has 255 bytes.
        if pair.name().len() > 200 {
            return Err(Error::Usage(format!(
                "a file cannot be called {}: give shorter domains",
                pair.name()
            )));
        }
        if pairs[..n].iter().any(|p| p.name() == pair.name()) {
            return Err(Error::Usage(format!(
                "two pairs would be called {}: give the domains names that differ in letters or digits",
                pair.name()
            )));
        }
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::sources::tests::pool;
    use super::*;

    #[test]
    fn every_candidate_comes_once_and_questions_equally_often() {
        for (n, m) in [(1, 1), (1, 5), (4, 6), (6, 4), (5, 7), (8, 8), (12, 18)] {
            let (a, b) = (Arc::new(pool("a", n)), Arc::new(pool("b", m)));
            let pair = Pair::new(3, [&a, &b]);
            assert_eq!(pair.len(), (n * m) as u64);
            let id = |k: u64| pair.candidate(k).map(|s| s.id.clone());
            let all: HashSet<_> = (0..pair.len()).map(id).collect();
            assert_eq!(all.len(), n * m, "{n} x {m}");
            let first: HashSet<_> = (0..n as u64).map(|k| id(k)[0].clone()).collect();
            assert_eq!(first.len(), n);
        }
    }

    #[test]
    fn the_order_is_the_seeds_and_of_no_other_pair() {
        let pools = [pool("a", 40), pool("b", 30), pool("c", 20)].map(Arc::new);
        let ids = |pair: &Pair| (0..20).map(|k| pair.candidate(k).map(|s| s.id.clone())).collect::<Vec<_>>();
        let all = pairs(&pools, &[], 7).unwrap();
        assert_eq!(all.iter().map(Pair::name).collect::<Vec<_>>(), ["a-b", "a-c", "b-c"]);
        let one = pairs(&pools, &[["b".into(), "c".into()]], 7).unwrap();
        assert_eq!(ids(&one[0]), ids(&all[2]));
        assert_ne!(ids(&pairs(&pools, &[], 8).unwrap()[2]), ids(&all[2]));
    }

    #[test]
    fn the_right_option_comes_to_each_place_equally_often() {
        let (a, b) = (Arc::new(pool("a", 5)), Arc::new(pool("b", 5)));
        let pair = Pair::new(0, [&a, &b]);
        let mut places = [0; 4];
        let mut orders = HashSet::new();
        for n in 0..400 {
            let gold = (n % 3) as usize;
            let order = pair.shuffle(n, 2 * n, gold);
            let mut sorted = order;
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3]);
            places[order.iter().position(|&o| o == gold).unwrap()] += 1;
            orders.insert(order);
        }
        assert_eq!(places, [100; 4]);
        assert!(orders.len() > 15, "{} orders", orders.len());
    }

    #[test]
    fn pairs_that_mean_nothing_are_refused() {
        let pools = [pool("Social Sciences", 2), pool("b", 2), pool("social-sciences", 1)].map(Arc::new);
        let asked = |list: &[[&str; 2]]| {
            let list: Vec<[String; 2]> = list.iter().map(|p| p.map(String::from)).collect();
            pairs(&pools, &list, 0).map(|p| p[0].name()).map_err(|e| e.to_string())
        };
        assert_eq!(asked(&[["Social Sciences", "b"]]), Ok("social_sciences-b".into()));
        for (list, expected) in [
            (&[["b", "b"]][..], "a pair is of two domains"),
            (
                &[["b", "x"]],
                "no source is of the domain \"x\": there are Social Sciences, b, social-sciences",
            ),
            (&[["b", "Social Sciences"], ["Social Sciences", "b"]], "is given twice"),
            (
                &[["b", "Social Sciences"], ["b", "social-sciences"]],
                "two pairs would be called b-social_sciences",
            ),
        ] {
            let err = asked(list).unwrap_err();
            assert!(err.contains(expected), "{err}");
        }
        assert!(
            pairs(&pools[..1], &[], 0)
                .unwrap_err()
                .to_string()
                .contains("are of one domain (Social Sciences)")
        );
    }
}
