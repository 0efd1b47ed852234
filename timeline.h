// timeline.h: when, on the device, the parts of a step began and ended: what --profile sums up, and what it writes to
// trace.json, which scripts/timeline.py draws and chrome://tracing and https://ui.perfetto.dev open.
#pragma once
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "common.h"

template <class Backend>
class Timeline {
    using Event = typename Backend::Event;
    std::deque<Event> events;  // made once, recorded anew in every step
    size_t used = 0;

  public:
    // From one point to another, of the model and the optimizer or beside them, of the collectives. number: of a bucket
    // or a micro-step.
    struct Span {
        const char* name;
        int number;
        size_t begin, end;
        bool beside;
    };
    std::vector<Span> spans;
    bool traces_collectives = false;

    void clear() { used = 0, spans.clear(); }

    // Notes how far the device is, and returns the number of that point. beside: in the order of the collectives, after
    // what has been enqueued so far.
    size_t point(bool beside = false) {
        if (used == events.size()) events.emplace_back();
        beside ? events[used].record_beside() : events[used].record();
        return used++;
    }
    void span(const char* name, int number, size_t begin, size_t end, bool beside = false) {
        spans.push_back({name, number, begin, end, beside});
    }

    // Milliseconds between two points, and of all spans of a name but those beside. The device has passed them.
    double ms(size_t begin, size_t end) const { return Event::ms(events[begin], events[end]); }
    double total_ms(const char* name) const {
        double sum = 0;
        for (const Span& span : spans)
            if (!span.beside && strcmp(span.name, name) == 0) sum += ms(span.begin, span.end);
        return sum;
    }

    // Chrome's trace format, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU: complete
    // events ("X") in microseconds, since the first point of the first timeline. Collectives that have not ended yet
    // are left out.
    static void write_trace(const std::string& path, const std::vector<const Timeline*>& steps, int64_t first_step,
                            const std::string& title) {
        std::string text = "{\"displayTimeUnit\": \"ms\", \"traceEvents\": [\n";
        auto name_of = [&](const char* what, int thread, const std::string& name) {
            text +=
                strprintf("{\"ph\": \"M\", \"pid\": 0, \"tid\": %d, \"name\": \"%s\", \"args\": {\"name\": \"%s\"}},\n",
                          thread, what, name.c_str());
        };
        name_of("process_name", 0, title);
        name_of("thread_name", 0, "compute");
        name_of("thread_name", 1, "collectives");
        const Event& origin = steps[0]->events[0];
        const char* between = "";
        for (size_t s = 0; s < steps.size(); s++)
            for (const Span& span : steps[s]->spans) {
                const Event &begin = steps[s]->events[span.begin], &end = steps[s]->events[span.end];
                if (!end.done()) continue;
                text += strprintf(
                    "%s{\"ph\": \"X\", \"pid\": 0, \"tid\": %d, \"name\": \"%s\", \"ts\": %.3f, \"dur\": %.3f, "
                    "\"args\": {\"step\": %lld, \"number\": %d}}",
                    between, span.beside ? 1 : 0, span.name, 1e3 * Event::ms(origin, begin),
                    1e3 * Event::ms(begin, end), static_cast<long long>(first_step) + static_cast<long long>(s),
                    span.number);
                between = ",\n";
            }
        text += "\n]}\n";
        FILE* file = fopen(path.c_str(), "we");
        const bool written = file && fwrite(text.data(), 1, text.size(), file) == text.size();
        if ((file && fclose(file) != 0) || !written) fail("cannot write %s: %s", path.c_str(), strerror(errno));
    }
};
