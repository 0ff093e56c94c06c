#include "run/loop.h"

#include <algorithm>

#include <ATen/ops/addcmul.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros.h>

#include "run/increments.h"
#include "run/tensors.h"
#include "run/step.h"
#include "files/text.h"

namespace olss {

namespace {

constexpr std::int64_t block = 1 << 15;  // CPU_BLOCK of kernels/lincomb.py

at::ScalarType sums_of(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// weights (k,) . columns (k, N) in the dtype of `weights`.
at::Tensor weighted_sum(const at::Tensor& columns, const at::Tensor& weights) {
    if (columns.scalar_type() == weights.scalar_type()) return at::mv(columns.t(), weights);
    const std::int64_t size = columns.size(1),
                       width = std::max<std::int64_t>(1, 8 * block / std::max<std::int64_t>(1, weights.size(0)));
    const at::Tensor total = at::empty({size}, weights.options());
    for (std::int64_t begin = 0; begin < size; begin += width) {
        const std::int64_t count = std::min(width, size - begin);
        at::Tensor part = total.narrow(0, begin, count);
        at::mv_out(part, columns.narrow(1, begin, count).to(weights.scalar_type()).t(), weights);
    }
    return total;
}

// The buffers of one run.
class Run {
  public:
    Run(const Tables& plan, const at::Tensor& noise, bool doubled, double guidance_scale)
        : plan_(plan), size_(noise.numel()), halves_(doubled ? 2 : 1) {
        std::vector<std::int64_t> shape = noise.sizes().vec();
        shape[0] *= halves_;
        x_ = at::empty(shape, noise.options());
        time_ = at::empty({shape[0]}, at::kFloat);
        history_ = at::empty({plan.rows.size(1), size_}, noise.options());
        guidance_ = at::full({}, guidance_scale, plan.rows.options());
        history_[0].copy_(noise.view({size_}));
    }

    void fill_noises(const at::Tensor& step_noise) {
        for (std::int64_t z = 0; z < plan_.noises; ++z) history_[first_noise() + z].copy_(step_noise[z].view({size_}));
    }

    const at::Tensor& x() const { return x_; }
    const at::Tensor& time() const { return time_; }

    // Takes the output of the evaluation before `row` in (none for row 0), and forms the next network input or the sample.
    void step(std::int64_t row, const at::Tensor& output) {
        at::Tensor raw;
        if (output.defined()) {
            if (output.sizes() != x_.sizes())
                fail(Error::Kind::network, "the network returned the shape ", shown(output.sizes()), " for an input of ",
                     shown(x_.sizes()));
            raw = output.to(x_.scalar_type()).contiguous().view({halves_, size_});
        }
        if (x_.scalar_type() == at::kFloat)
            step_in_one<float>(row, raw);
        else if (x_.scalar_type() == at::kDouble)
            step_in_one<double>(row, raw);
        else
            step_of_halves(row, raw);
        time_.fill_(plan_.timesteps[row]);
    }

    at::Tensor result() const {
        const at::Tensor samples = x_.narrow(0, 0, x_.size(0) / halves_);
        if (!at::isfinite(samples).all().item<bool>()) require_finite();
        return samples.clone();
    }

  private:
    std::int64_t noises_of(std::int64_t row) const { return plan_.noise_counts[static_cast<std::size_t>(row)]; }

    // As olss_fast/executors/host_step.py.
    template <typename T>
    void step_in_one(std::int64_t row, const at::Tensor& raw) {
        const at::Tensor& first = plan_.anchored && row > 0 ? x_ : history_;
        const StepColumns<T> columns{history_.data_ptr<T>(), first.const_data_ptr<T>(), history_.stride(0), size_,
                                     1 + row * plan_.branches, first_noise(), noises_of(row),
                                     static_cast<int>(plan_.branches), halves_ == 2};
        host_step(columns, raw.defined() ? raw.const_data_ptr<T>() : nullptr, *guidance_.const_data_ptr<T>(),
                  plan_.rows.const_data_ptr<T>() + row * plan_.rows.stride(0), x_.data_ptr<T>());
    }

    // As the reference of kernels/step.py.
    void step_of_halves(std::int64_t row, at::Tensor outputs) {
        const std::int64_t known = 1 + row * plan_.branches, noises = noises_of(row);
        if (outputs.defined()) {
            if (halves_ == 2 && plan_.branches == 1) {
                const at::Tensor both = outputs.to(plan_.rows.scalar_type()), unconditional = both[0];
                outputs = at::addcmul(unconditional, guidance_, at::sub(both[1], unconditional));
            }
            history_.narrow(0, known - plan_.branches, plan_.branches).copy_(outputs);
        }
        const at::Tensor weights = plan_.rows[row];
        at::Tensor total = weighted_sum(history_.narrow(0, 0, known), weights.narrow(0, 0, known));
        if (noises > 0)
            total.add_(
                weighted_sum(history_.narrow(0, first_noise(), noises), weights.narrow(0, first_noise(), noises)));
        x_.view({halves_, size_}).copy_(total);
    }

    std::int64_t first_noise() const { return 1 + plan_.nfe * plan_.branches; }

    void require_finite() const {
        for (std::int64_t column = 1; column < first_noise(); ++column)
            if (!at::isfinite(history_[column]).all().item<bool>())
                fail(Error::Kind::network, "the network returned NaN or infinity at evaluation ",
                     (column - 1) / plan_.branches, "; lower the guidance, or build the engine in a wider dtype");
        fail(Error::Kind::network, "the sample is beyond the range of ", name_of(x_.scalar_type()),
             "; build the engine in a wider dtype");
    }

    const Tables& plan_;
    const std::int64_t size_, halves_;
    at::Tensor x_, time_, history_, guidance_;
};

}  // namespace

Tables::Tables(const Plan& plan, at::ScalarType dtype) : nfe(plan.nfe), branches(plan.branches), noises(plan.noises()) {
    const auto table = [](const std::vector<double>& values, at::IntArrayRef shape, at::ScalarType type) {
        return at::from_blob(const_cast<double*>(values.data()), shape, at::kDouble).to(type, false, /*copy=*/true);
    };
    const Increments found =
        dtype == sums_of(dtype) ? increments(plan.rows, plan.first_noise(), plan.columns) : Increments{plan.rows, false};
    anchored = found.anchored;
    rows = table(found.rows, {nfe + 1, plan.columns}, sums_of(dtype));
    timesteps = at::zeros({nfe + 1}, at::kFloat);
    timesteps.narrow(0, 0, nfe).copy_(table(plan.timesteps, {nfe}, at::kFloat));
    for (std::int64_t row = 0; row <= nfe; ++row) {
        std::int64_t last = plan.columns;
        while (last > plan.first_noise() && found.rows[static_cast<std::size_t>(row * plan.columns + last - 1)] == 0)
            --last;
        noise_counts.push_back(last - plan.first_noise());
    }
}

at::Tensor sample(const Tables& plan, const Network& network, const at::Tensor& noise, const at::Tensor& step_noise,
                  bool doubled, double guidance_scale) {
    Run run(plan, noise, doubled, guidance_scale);
    if (step_noise.defined()) run.fill_noises(step_noise);
    run.step(0, {});
    for (std::int64_t i = 0; i < plan.nfe; ++i) {
        run.step(i + 1, network(run.x(), run.time()));
    }
    return run.result();
}

}  // namespace olss
