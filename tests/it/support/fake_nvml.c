/* An NVML whose GPU does what the file says that FAKE_NVML_STATE names: ok, lost, hang, none,
   nodriver, unsupported, busy, "xid N" (told once for each N), "xids N" (told at each look), or with two GPUs: two, "two xids N". */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, UNSUPPORTED = 3, DRIVER_NOT_LOADED = 9, TIMEOUT = 10, GPU_IS_LOST = 15 };
enum { XID_EVENT = 0x8 };

typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2_t;
typedef struct { unsigned gpu, memory; } utilization_t;
typedef struct {
    void *device;
    unsigned long long type, data;
    unsigned gpu_instance, compute_instance;
} event_t;

static unsigned long long told_xid;
static int told_at_this_look;

static const char *state(void) {
    static __thread char text[64];
    FILE *file = fopen(getenv("FAKE_NVML_STATE"), "r");
    text[0] = 0;
    if (file) {
        if (!fgets(text, sizeof text, file)) text[0] = 0;
        fclose(file);
    }
    text[strcspn(text, "\n")] = 0;
    return text;
}

static int is(const char *name) { return strcmp(state(), name) == 0; }

int nvmlInit_v2(void) { return is("nodriver") ? DRIVER_NOT_LOADED : SUCCESS; }
int nvmlShutdown(void) {
    while (is("hang")) usleep(10000);
    return SUCCESS;
}
const char *nvmlErrorString(int code) { (void)code; return "fake"; }
int nvmlSystemGetDriverVersion(char *text, unsigned length) {
    snprintf(text, length, "550.00");
    return SUCCESS;
}
int nvmlDeviceGetCount_v2(unsigned *count) {
    if (is("nodriver")) return DRIVER_NOT_LOADED;
    *count = is("none") ? 0 : strncmp(state(), "two", 3) == 0 ? 2 : 1;
    return SUCCESS;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    *device = (void *)(unsigned long)(index + 1);
    return SUCCESS;
}
int nvmlDeviceGetIndex(void *device, unsigned *index) {
    *index = (unsigned)(unsigned long)device - 1;
    return SUCCESS;
}
int nvmlDeviceGetMemoryInfo_v2(void *device, memory_v2_t *memory) {
    (void)device;
    while (is("hang")) usleep(10000);
    if (is("lost")) return GPU_IS_LOST;
    if (is("unsupported")) return UNSUPPORTED;
    memory->total = 1000;
    memory->reserved = 0;
    memory->used = is("busy") ? 1000 : 250;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}
int nvmlDeviceGetName(void *device, char *text, unsigned length) {
    (void)device;
    snprintf(text, length, "Fake GPU");
    return SUCCESS;
}
int nvmlDeviceGetUUID(void *device, char *text, unsigned length) {
    snprintf(text, length, "GPU-fake-%lu", (unsigned long)device);
    return SUCCESS;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    (void)device;
    *major = 8;
    *minor = 9;
    return SUCCESS;
}
int nvmlDeviceGetUtilizationRates(void *device, utilization_t *rates) {
    (void)device;
    rates->gpu = is("busy") ? 100 : 7;
    rates->memory = 3;
    return SUCCESS;
}
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *celsius) {
    (void)device;
    (void)sensor;
    *celsius = 55;
    return SUCCESS;
}
int nvmlEventSetCreate(void **set) {
    *set = (void *)1;
    return SUCCESS;
}
int nvmlEventSetFree(void *set) { (void)set; return SUCCESS; }
/* The second GPU offers no events. */
int nvmlDeviceRegisterEvents(void *device, unsigned long long types, void *set) {
    (void)types;
    (void)set;
    return device == (void *)2 ? UNSUPPORTED : SUCCESS;
}
int nvmlEventSetWait_v2(void *set, event_t *event, unsigned milliseconds) {
    unsigned long long xid;
    (void)set;
    (void)milliseconds;
    const char *said = state();
    if (strncmp(said, "two ", 4) == 0) said += 4;
    if (sscanf(said, "xids %llu", &xid) == 1) {
        /* A look asks until there is no more. */
        told_at_this_look = !told_at_this_look;
        if (!told_at_this_look) return TIMEOUT;
    } else if (sscanf(said, "xid %llu", &xid) == 1 && xid != told_xid) {
        told_xid = xid;
    } else {
        return TIMEOUT;
    }
    memset(event, 0, sizeof *event);
    event->device = (void *)1;
    event->type = XID_EVENT;
    event->data = xid;
    return SUCCESS;
}
