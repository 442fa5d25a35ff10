//! LoRA-CR from the factors against its dense definition, and the identities that it must have, on every device.

mod dense;

mod on_cpu {
    use anabranch::fuse::Batch;

    const CASES: u32 = 200;

    fn resolve(batch: &Batch, options: LoraCr) -> (Batch, Resolved) {
        let (out, compared) = dense::resolve(&dense::cpu(), batch, &options);
        (out, compared.resolved.unwrap())
    }

    include!("lora_cr/identities.rs");
}

mod on_cuda {
    use std::sync::LazyLock;

    use anabranch::cuda::{Cuda, find};
    use anabranch::fuse::Batch;

    const CASES: u32 = 30;

    /// The first device; none where no driver answers.
    static DEVICE: LazyLock<Option<Cuda>> = LazyLock::new(|| {
        let found = find();
        let there = matches!(found.driver, Ok((_, 1..))) && found.kernels > 0;
        assert!(there || !cfg!(feature = "emulator"), "the emulator does not answer");
        there.then(|| Cuda::new(0, None).unwrap())
    });

    fn resolve(batch: &Batch, options: LoraCr) -> (Batch, Resolved) {
        let (out, compared) = match &*DEVICE {
            Some(cuda) => dense::resolve(cuda, batch, &options),
            None => {
                eprintln!("skipped, no CUDA device or no kernels: on the CPU again");
                dense::resolve(&dense::cpu(), batch, &options)
            }
        };
        (out, compared.resolved.unwrap())
    }

    include!("lora_cr/identities.rs");
}
